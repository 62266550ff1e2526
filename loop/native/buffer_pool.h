/* SPDX-License-Identifier: Apache-2.0
 *
 * Page-aligned memory for native requests, by powers of two, reused last in, first out: what went out
 * last is what the CPU's cache still holds. The C twin of buffers.py.
 *
 * Read by the C compiler and by cffi. Context: one thread at a time per pool. */

struct pool_buffer {
    struct pool_buffer *next;
    uint64_t address;  /* page-aligned; what is in it is arbitrary */
    uint64_t capacity; /* bytes */
};

struct buffer_pool;

/* NULL when there is no memory. Keeps at most retained_max bytes of idle buffers. */
struct buffer_pool *buffer_pool_open(uint64_t retained_max);

/* Unmaps all idle buffers. */
void buffer_pool_close(struct buffer_pool *pool);

/* A buffer of at least `length` bytes, up to 32 MiB. NULL when there is no memory. */
struct pool_buffer *buffer_take(struct buffer_pool *pool, uint64_t length);

/* Nobody uses it any more. */
void buffer_give(struct buffer_pool *pool, struct pool_buffer *buffer);
