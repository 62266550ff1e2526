/* SPDX-License-Identifier: Apache-2.0
 *
 * The native poll: an AioContext's wait as one C function, without the GIL. It sleeps in epoll,
 * serves native handlers by itself, and returns to Python only with Python's work: a descriptor that
 * Python watches (the notifier is one), an event that a native handler posts, or the deadline.
 *
 * Read by the C compiler and by cffi, so plain declarations only. No Python API in here or behind it.
 *
 * Context: one thread at a time per poll, the home thread of the AioContext that owns it.
 * Errors: every int result below is -errno where it is negative. */

struct native_poll;
struct poll_handler;
struct aio_queue;

/* A descriptor that Python watches is ready. Native byte order and alignment: "@iI". */
struct poll_ready {
    int32_t fd;
    uint32_t events; /* EPOLLIN and so on */
};

/* What a native handler has to say to Python. "@QQQ". */
struct poll_event {
    uint64_t token; /* of the handler: Python chose it */
    uint64_t what;  /* the handler's own business, as is `value` */
    uint64_t value;
};

/* Something that the poll serves without Python; embedded in the structure it serves. All callbacks
 * run inside native_poll_wait, except that `flush` may also run when Python calls into the handler. */
struct poll_handler {
    /* epoll says that fd is ready; `events` may hold EPOLLERR and EPOLLHUP unasked. */
    void (*ready)(struct native_poll *poll, struct poll_handler *handler, uint32_t events);
    /* poll_again() was called: the work that a bound of one pass had stopped. */
    void (*go_on)(struct native_poll *poll, struct poll_handler *handler);
    /* poll_flush_later() was called: the end of a pass, where batches leave. */
    void (*flush)(struct native_poll *poll, struct poll_handler *handler);
    struct poll_handler *next; /* of all handlers, for external_disabled */
    struct poll_handler *previous;
    struct poll_handler *next_again;
    struct poll_handler *next_flush;
    int32_t fd;
    uint32_t interest; /* what it wants to hear of: EPOLLIN, EPOLLOUT, or 0 */
    uint32_t watched;  /* what epoll has been asked for: 0 while silenced */
    int32_t is_again;
    int32_t is_flush;
};

/* One request of Linux AIO, embedded in whatever it is done for. */
struct poll_io {
    struct poll_io *next; /* while it waits for a slot */
    uint64_t address;     /* memory, aligned as the file wants it */
    uint64_t length;      /* bytes */
    int64_t offset;       /* in the file */
    int32_t fd;
    int32_t rw_flags; /* RWF_* */
    int32_t opcode;   /* IO_CMD_* */
    /* Called inside native_poll_wait with bytes or -errno; never from within poll_io_start. */
    void (*done)(struct native_poll *poll, struct poll_io *io, int64_t result);
};

struct native_poll {
    int32_t epoll_fd;
    int32_t external_disabled; /* native handlers are silent: set by native_poll_silence */
    uint32_t ready_count;      /* of `ready`, after a wait */
    uint32_t event_count;      /* of `events`; Python sets it to 0 when it has taken them */
    uint32_t event_capacity;
    uint32_t handler_count;
    struct poll_ready *ready;   /* [POLL_READY_MAX] */
    struct poll_event *events;  /* [event_capacity] */
    struct poll_handler *handlers;
    struct poll_handler *again_first;
    struct poll_handler *again_last;
    struct poll_handler *flush_first;
    struct poll_handler *flush_last;
    struct buffer_pool *buffers; /* aligned memory for native requests */

    /* Linux AIO, where native_poll_open_aio found it. */
    struct aio_queue *aio;
    int32_t aio_eventfd;
    uint32_t aio_free_count;
    uint32_t *aio_free;         /* [depth] slots, used again last in, first out */
    struct poll_io **aio_slots; /* [depth] */
    struct poll_io *aio_waiting_first;
    struct poll_io *aio_waiting_last;

    /* Adaptive polling: how long to look for work before sleeping. All nanoseconds. */
    int64_t poll_ns;     /* now; between 0 and poll_max_ns */
    int64_t poll_io_ns;  /* the same while Linux AIO works for us: up to POLL_IO_FACTOR times that */
    int64_t poll_max_ns; /* 0: don't */
    int64_t poll_grow;   /* factor by which poll_ns grows, 0 for 2 */
    int64_t poll_shrink; /* divisor by which it shrinks, 0 for back to 0 */
    int64_t now_ns;      /* CLOCK_MONOTONIC at the beginning of this pass */
    int64_t slot_ns;     /* the same of its half that runs: what is ready, then what goes on */
    uint32_t slot_turns; /* how often poll_is_late was asked in it */

    /* Counters, for whoever wants to know. */
    uint64_t sleeps;      /* epoll_wait calls that could block */
    uint64_t passes;      /* times that native handlers were looked at */
    uint64_t spins_hit;   /* adaptive polling found work */
    uint64_t spins_missed;
};

/* Makes a poll. *result is to be closed by native_poll_close. */
int native_poll_open(struct native_poll **result);

/* Gives everything back. No native handler may be left, and no AIO in flight. */
void native_poll_close(struct native_poll *poll);

/* Python wants `events` (EPOLLIN, EPOLLOUT) of fd, instead of `before`; 0 is nothing. */
int native_poll_watch(struct native_poll *poll, int32_t fd, uint32_t before, uint32_t events);

/* Waits until there is work for Python, or timeout_ns are over (-1: never), and serves native
 * handlers meanwhile. 0 is one pass without a sleep. Fills `ready`, and leaves `events` posted.
 * Returns ready_count + event_count; -EINTR when a signal came first, for Python to run its handlers. */
int native_poll_wait(struct native_poll *poll, int64_t timeout_ns);

/* Whether the next wait would find work without asking the kernel. */
int native_poll_has_work(const struct native_poll *poll);

/* Silences native handlers (1) or lets them speak again (0): no new requests are read. I/O in flight
 * goes on. */
void native_poll_silence(struct native_poll *poll, int32_t silent);

/* Makes room for one event of a token that isn't a handler's, such as a direct map's. */
int native_poll_add_token(struct native_poll *poll);

/* Takes the room back. An event that is posted keeps its place. */
void native_poll_remove_token(struct native_poll *poll);

/* Has Linux AIO of `depth` slots ready, once. Fails where the kernel has none to give. */
int native_poll_open_aio(struct native_poll *poll, uint32_t depth);

/* For native handlers, and not for Python: */

/* Adds a handler, without any interest yet, and room for `events` more events. */
int poll_add(struct native_poll *poll, struct poll_handler *handler, uint32_t events);

/* Takes it out of everything. Its descriptor must still be open. */
void poll_remove(struct native_poll *poll, struct poll_handler *handler, uint32_t events);

/* What to hear of from now on. Errors of epoll are the handler's system calls' to find. */
void poll_interest(struct native_poll *poll, struct poll_handler *handler, uint32_t interest);

/* Has go_on called in the next pass, which begins without a sleep. */
void poll_again(struct native_poll *poll, struct poll_handler *handler);

/* Whether others have had so much time in this half of the pass that who comes now should take a
 * short turn, and call poll_again for the rest: whoever waits behind has perhaps little to do. To be
 * asked once at the beginning of a turn. */
int poll_is_late(struct native_poll *poll);

/* Has flush called at the end of this pass, or of the next. */
void poll_flush_later(struct native_poll *poll, struct poll_handler *handler);

/* Tells Python. A handler may have as many posted as it made room for, and a token one. */
void poll_post(struct native_poll *poll, uint64_t token, uint64_t what, uint64_t value);

/* Queues a request: it leaves with its batch, at the latest at the end of the pass. */
void poll_io_start(struct native_poll *poll, struct poll_io *io);
