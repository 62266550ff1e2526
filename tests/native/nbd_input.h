/* SPDX-License-Identifier: Apache-2.0
 *
 * The language of inputs: four bytes of settings, then operations of one byte each, some with
 * arguments. Any bytes are an input; one that ends early has zeroes for the rest. */

enum setting {
    /* The first byte. */
    SET_KIND = 0x03,      /* enum map_io - 1, modulo 3 */
    SET_HELD = 0x04,      /* the map begins held */
    SET_DURABLE = 0x08,
    SET_READ_ONLY = 0x10, /* writable 0 */
    SET_NO_MAP = 0x20,
    SET_TWO = 0x40,       /* clients, on one poll and one map */
    SET_SMALL_BUFFER = 0x80, /* the socket's, so that it fills up */
    /* The second: limits (0x03), page bits (0x0c), where pages lie (0x30), alignment (0xc0). */
    /* The third: published pages (0x03), and whether the map ends before the disk does (0x08). */
    SET_HOLD_IO = 0x04,    /* AIO waits to be let go */
    SET_SPIN = 0x10,       /* adaptive polling */
    SET_SMALL_POOL = 0x20, /* of buffers: most go back to the kernel */
    /* The fourth. */
    SET_ABRUPT = 0x03, /* if both: the connections are closed in the middle of it all */
    SET_DEEP = 0x04,   /* many slots for AIO: batches are full before slots run out */
    SET_STYLE = 0x18,  /* enum nbd_style of the first client, modulo 3; the second has the next */
};

/* An operation is its byte modulo OP_COUNT; bit 7 chooses the client. */
enum operation {
    OP_REQUEST,   /* command, offset, length: appends a valid request, with its payload */
    OP_REQUEST_2, /* the same: it is what most inputs are made of */
    OP_REQUEST_3,
    OP_DAMAGED,   /* as OP_REQUEST, then where and what: one byte of the header is another */
    OP_RAW,       /* count, bytes */
    OP_WRITE,     /* count: the client sends up to that much of what was appended */
    OP_WRITE_ALL,
    OP_PASS,
    OP_PASS_2,
    OP_SLEEP, /* until there is work for Python, or a moment is over */
    OP_READ, /* count: the client takes up to that much */
    OP_READ_ALL,
    OP_FINISH,     /* which, error or in how many chunks: a fault is answered */
    OP_FINISH_ALL, /* the last first, all well */
    OP_QUIET,
    OP_SILENCE,
    OP_PUBLISH,  /* page, how */
    OP_WITHDRAW, /* first page, how many more */
    OP_HOLD,
    OP_SET_MAP, /* whether there is one, and whether it is writable */
    OP_HOLD_IO,
    OP_RELEASE_IO, /* which */
    OP_TROUBLE,    /* enum trouble, and 4 times how often but one */
    OP_WAIT_IDLE,  /* Python waits for the requests that are under way by the map */
    OP_RARE,       /* which: what ends a connection, and would end most inputs early */
    OP_COUNT,
    OP_CLIENT = 0x80,
};

enum rare {
    RARE_NOTHING,
    RARE_STOP,
    RARE_CLOSE,
    RARE_SHUT,
    RARE_LEAVE,
    RARE_CLEAR,
    RARE_COUNT = 32,
};
