/* SPDX-License-Identifier: Apache-2.0
 *
 * One NBD connection in its transmission phase, served by the native poll: plain requests from the
 * socket to the host file and back, without Python. What isn't plain (a miss in the map, another
 * command, a flag, an error) is a fault: Python gets the request with its payload, and answers it in
 * the same stream of replies.
 *
 * The life of a connection is Python's (native_connection.py): it hears of the client's end, decides
 * what that means, and says stop, close and free.
 *
 * Read by the C compiler and by cffi, so plain declarations only. Context: the home thread of the
 * export's AioContext, as the poll. Source: the NBD protocol, "Transmission phase". */

struct native_poll;
struct direct_map;
struct nbd_connection;

/* What a connection posts to Python: `what` of a poll_event. `value`, where it says nothing else, is
 * an errno or 0. */
enum nbd_event {
    NBD_FAULT = 1,      /* value: address of the struct nbd_request, Python's until nbd_finish */
    NBD_END = 2,        /* end of stream; nothing more is read, as after all that follow */
    NBD_DISCONNECT = 3, /* the client's DISC */
    NBD_BAD_MAGIC = 4,
    NBD_TOO_LONG = 5,   /* value: bytes of a payload that is neither taken nor dropped */
    NBD_RECEIVE_FAILED = 6,
    NBD_SEND_FAILED = 7,
    NBD_ANSWERED = 8,   /* after nbd_stop: nothing in flight, nothing unsent. Or at once, if so */
    NBD_RELEASED = 9,   /* after nbd_close: no request in flight any more; nbd_free may follow */
};

/* How requests and replies look: reply_style.py. */
enum nbd_style {
    NBD_STYLE_SIMPLE = 0,
    NBD_STYLE_STRUCTURED = 1,
    NBD_STYLE_EXTENDED = 2,
};

/* What a connection may cost: limits.py says why. */
struct nbd_limits {
    uint32_t request_length_max;
    uint32_t discard_length_max;
    uint32_t in_flight_requests_max;
    uint32_t unsent_parts_max;
    uint64_t in_flight_bytes_max;
    uint64_t unsent_bytes_max;
    uint32_t round_requests_max;
    uint32_t round_bytes_max;
};

enum { NBD_LATENCY_BUCKETS = 40 };

/* Of one operation. Only ever grows; another thread may read while it does. */
struct nbd_counters {
    uint64_t requests;
    uint64_t bytes;
    uint64_t failures;    /* host I/O that went wrong, and became a fault */
    uint64_t latency_ns;  /* sum, from parsed to answered */
    uint64_t latency[40]; /* [n]: requests that took under 2^n ns, and no less than half of it */
};

/* Of one export in one thread: all its connections count here. */
struct nbd_statistics {
    struct nbd_counters reads;
    struct nbd_counters writes;
    struct nbd_counters flushes;
    uint64_t faults;
};

/* A request that Python may look into while it is a fault. */
struct nbd_fault {
    uint64_t offset;
    uint64_t address; /* of the payload, or of the memory for what is read; 0: there is none */
    uint64_t length;
    uint64_t cookie;  /* its eight bytes, as they lie in memory */
    uint16_t command;
    uint16_t flags;
    uint32_t retry;   /* 1: host I/O went wrong here; ask the graph at once */
    uint32_t dropped; /* 1: a payload too long to take: it was dropped, answer with an error */
    uint32_t error;   /* errno of a flush that failed: a second one might succeed though data is lost */
};

/* A part of a reply. */
struct nbd_part {
    uint64_t address;
    uint64_t bytes;
};

struct nbd_request;

/* Takes part in `poll` with `fd`, which is connected, non-blocking, and stays Python's to close.
 * Nothing is read before nbd_resume. NULL when there is no memory, or epoll takes no more. */
struct nbd_connection *nbd_open(struct native_poll *poll, int32_t fd, uint64_t token,
                                const struct nbd_limits *limits, struct nbd_statistics *statistics,
                                int32_t style);

/* By which map requests are served from now on; NULL for none: then all are faults. `writable` 0:
 * writes are faults, too. */
void nbd_set_map(struct nbd_connection *connection, struct direct_map *map, int32_t writable);

/* A drained section begins (1): no request is begun; or ends (0). */
void nbd_set_quiet(struct nbd_connection *connection, int32_t quiet);

/* Begins to read, or goes on. */
void nbd_resume(struct nbd_connection *connection);

/* Looks at a fault: fills *fault. */
void nbd_describe(const struct nbd_request *request, struct nbd_fault *fault);

/* Answers a fault: all went well. A READ's memory is sent along. */
void nbd_finish(struct nbd_request *request);

/* Answers a fault with these parts, at least one, none empty. Those within the request's memory are
 * sent from there, the others are copied now. 0, or -ENOMEM: the fault is as it was. */
int nbd_answer(struct nbd_request *request, const struct nbd_part *parts, uint32_t count);

/* Reads no more; NBD_ANSWERED follows when everything that is owed has been sent. */
void nbd_stop(struct nbd_connection *connection);

/* Lets go of the descriptor and of unsent replies, now. NBD_RELEASED follows when nothing is in
 * flight. */
void nbd_close(struct nbd_connection *connection);

/* After NBD_RELEASED. */
void nbd_free(struct nbd_connection *connection);

/* Whether anything is in flight, unsent, or half received. */
int nbd_is_busy(const struct nbd_connection *connection);
