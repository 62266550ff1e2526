/* SPDX-License-Identifier: Apache-2.0
 *
 * What the C files of a connection share, and Python doesn't see. */

#include <sys/uio.h>

enum {
    NBD_READ = 0,
    NBD_WRITE = 1,
    NBD_DISC = 2,
    NBD_FLUSH = 3,
    NBD_FLAG_FUA = 1,
    NBD_FLAG_PAYLOAD_LEN = 32,
    NBD_CHUNK_DONE = 1, /* a reply flag */
    NBD_CHUNK_NONE = 0, /* types of chunks */
    NBD_CHUNK_DATA = 1,
    NBD_REQUEST_BYTES = 28, /* magic 4, flags 2, command 2, cookie 8, offset 8, length 4 */
    NBD_EXTENDED_REQUEST_BYTES = 32, /* the same with a length of 8 */
    NBD_REPLY_BYTES = 16,            /* magic 4, error 4, cookie 8 */
    NBD_HEAD_BYTES_MAX = 40,         /* of an extended chunk, with the offset of its data */
    NBD_REQUEST_MAGIC = 0x25609513,
    NBD_EXTENDED_REQUEST_MAGIC = 0x21e41c71,
    NBD_SIMPLE_REPLY_MAGIC = 0x67446698,
    NBD_STRUCTURED_REPLY_MAGIC = 0x668e33ef,
    NBD_EXTENDED_REPLY_MAGIC = 0x6e8a278c,

    /* Holds a batch of 128 writes of 4 KiB; untouched pages cost nothing. */
    NBD_RECEIVE_BYTES = 512 << 10,
    /* Payloads up to this size wait in the receive buffer until they are whole. */
    NBD_WAIT_BYTES_MAX = 64 << 10,
    /* Received beyond the end of a big payload in the same call: the next header or a few. */
    NBD_LOOK_AHEAD_BYTES = 4 << 10,
    /* Queued replies that leave without waiting for the end of the pass: reply_queue.py says why. */
    NBD_EARLY_BYTES = 128 << 10,
    NBD_EARLY_PARTS = 16,
    /* Pieces that one sendmsg gathers. */
    NBD_PARTS_MAX = 256,
};

/* A reply in Python's words: pieces of text, which lie behind it, and of the request's buffer. */
struct nbd_answer {
    uint64_t bytes;
    uint32_t count;
    struct iovec parts[];
};

/* One request from its header to the last byte of its reply. */
struct nbd_request {
    struct poll_io io; /* first: io.done finds the request by it */
    struct map_pin pin;
    struct direct_map *map; /* while host I/O by it is under way */
    struct nbd_connection *connection;
    struct nbd_request *next; /* in the queue of replies, or among the free ones */
    struct pool_buffer *buffer;
    uint64_t offset;
    uint64_t started_ns;
    uint64_t length;
    uint16_t command;
    uint16_t flags; /* without PAYLOAD_LEN */
    uint16_t error;
    uint8_t has_payload;
    uint8_t retry;
    uint8_t dropped;
    uint32_t head_bytes;
    uint64_t data_bytes;       /* of the reply, behind its head */
    struct nbd_answer *answer; /* instead of head and data */
    uint8_t cookie[8];
    uint8_t head[NBD_HEAD_BYTES_MAX];
};

struct nbd_connection {
    struct poll_handler handler; /* first: callbacks find the connection by it */
    struct native_poll *poll;
    struct nbd_statistics *statistics;
    struct direct_map *map;
    uint64_t token;
    struct nbd_limits limits;
    int32_t fd;
    int32_t writable;
    int32_t style; /* enum nbd_style */

    uint8_t quiet;    /* a drained section: begin no request */
    uint8_t paused;   /* requests have arrived that wait for a bound to fall */
    uint8_t blocked;  /* the kernel's buffer is full */
    uint8_t ended;    /* the client can't be heard any more: an end was posted */
    uint8_t stopping; /* nbd_stop: post NBD_ANSWERED */
    uint8_t answered; /* that was posted */
    uint8_t failed;   /* sending failed: that was posted */
    uint8_t closed;   /* nbd_close: the descriptor isn't ours */
    uint8_t released; /* NBD_RELEASED was posted */

    uint32_t in_flight;
    uint64_t in_flight_bytes;

    struct nbd_request *replies_first;
    struct nbd_request *replies_last;
    uint64_t unsent_bytes;
    uint32_t unsent_parts;
    uint64_t head_sent; /* bytes of the first reply that have left */

    uint8_t *received; /* [NBD_RECEIVE_BYTES]; what isn't parsed is [start, end) */
    uint32_t start;
    uint32_t end;
    struct nbd_request *incoming; /* whose payload is on its way */
    uint64_t incoming_bytes;      /* of it, there already; while dropping: still to come */

    struct nbd_request *free;
};

/* headers.c: the layouts. */
static uint32_t nbd_get32(const uint8_t *from);
static void nbd_read_header(struct nbd_request *request, const uint8_t *header, uint64_t now_ns);
static uint32_t nbd_write_head(struct nbd_request *request);

/* requests.c: from nothing, and back to it. */
static struct nbd_request *nbd_request_new(struct nbd_connection *connection);
static void nbd_request_release(struct nbd_request *request);
static int nbd_request_buffer(struct nbd_request *request);
static void nbd_request_forget(struct nbd_request *request);
static void nbd_fault(struct nbd_request *request);

/* plain_io.c: the host's part. */
static void nbd_start_read(struct nbd_request *request);
static void nbd_start_write(struct nbd_request *request);
static void nbd_start_flush(struct nbd_request *request);
static int nbd_write_in_place(struct nbd_connection *connection, const struct nbd_request *header,
                              const uint8_t *payload);

/* replies.c: the way out. */
static void nbd_reply(struct nbd_request *request);
static void nbd_reply_soon(struct nbd_request *request);
static void nbd_drop_replies(struct nbd_connection *connection);
static void nbd_send(struct nbd_connection *connection);
static void nbd_check_answered(struct nbd_connection *connection);

/* transmission.c: the way in. */
static void nbd_unpause(struct nbd_connection *connection);
static void nbd_update_interest(struct nbd_connection *connection);
static int nbd_backed_up(const struct nbd_connection *connection);
