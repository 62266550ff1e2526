/* SPDX-License-Identifier: Apache-2.0
 *
 * Reads and writes that may block, many to a call: what a worker thread runs without the GIL. Read
 * by the C compiler and by cffi, so plain declarations only. */

/* One request. Python packs it; native byte order, no padding: "@QQqqii". */
struct transfer {
    uint64_t address; /* of the memory to read into or write from */
    uint64_t length;  /* bytes */
    int64_t offset;   /* in the file */
    int64_t moved;    /* in: bytes that are there already; out: bytes in all, or -errno */
    int32_t fd;
    int32_t is_write;
};

/* Does `count` requests, one after the other, each as if it were alone: an error ends its own and
 * goes into its `moved`. A write moves all bytes or fails; a read ends early only at the end of the
 * file. Interrupted calls are repeated, short ones continued. Reads are announced to the page cache
 * first, so that a disk sees all of a batch at once.
 *
 * The memory belongs to this call until it returns. Any thread; no state but the requests. */
void transfer_all(struct transfer *transfers, uint32_t count);
