/* SPDX-License-Identifier: Apache-2.0
 *
 * The pool of buffer_pool.h: a stack of idle mappings for each power of two, as in buffers.py, where
 * the reasons stand. A buffer that would go over the bound is unmapped instead of kept. */

#undef NDEBUG /* distutils sets it; what must hold is asserted all the same */

#include <assert.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

enum {
    POOL_BITS_MIN = 12, /* a page */
    POOL_BITS_MAX = 25, /* 32 MiB: the largest request of the NBD protocol's default */
    POOL_CLASSES = POOL_BITS_MAX - POOL_BITS_MIN + 1,
};

struct buffer_pool {
    uint64_t retained; /* bytes of idle buffers */
    uint64_t retained_max;
    struct pool_buffer *idle[POOL_CLASSES];
};

/* The class whose buffers hold `length` bytes; POOL_CLASSES or more when none does. */
static unsigned pool_class(uint64_t length)
{
    if (length <= UINT64_C(1) << POOL_BITS_MIN)
        return 0;
    return 64u - (unsigned)__builtin_clzll(length - 1) - POOL_BITS_MIN;
}

static struct pool_buffer *pool_map(uint64_t capacity)
{
    struct pool_buffer *buffer = malloc(sizeof *buffer);
    void *memory;

    if (buffer == NULL)
        return NULL;
    memory = mmap(NULL, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        free(buffer);
        return NULL;
    }
    buffer->next = NULL;
    buffer->address = (uint64_t)(uintptr_t)memory;
    buffer->capacity = capacity;
    return buffer;
}

static void pool_unmap(struct pool_buffer *buffer)
{
    munmap((void *)(uintptr_t)buffer->address, buffer->capacity);
    free(buffer);
}

struct buffer_pool *buffer_pool_open(uint64_t retained_max)
{
    struct buffer_pool *pool = calloc(1, sizeof *pool);

    if (pool != NULL)
        pool->retained_max = retained_max;
    return pool;
}

void buffer_pool_close(struct buffer_pool *pool)
{
    for (unsigned class = 0; class < POOL_CLASSES; class++) {
        struct pool_buffer *buffer;

        while ((buffer = pool->idle[class]) != NULL) {
            pool->idle[class] = buffer->next;
            pool_unmap(buffer);
        }
    }
    free(pool);
}

struct pool_buffer *buffer_take(struct buffer_pool *pool, uint64_t length)
{
    unsigned class = pool_class(length);
    struct pool_buffer *buffer;

    if (class >= POOL_CLASSES)
        return NULL;
    buffer = pool->idle[class];
    if (buffer == NULL)
        return pool_map(UINT64_C(1) << (class + POOL_BITS_MIN));
    pool->idle[class] = buffer->next;
    pool->retained -= buffer->capacity;
    buffer->next = NULL;
    return buffer;
}

void buffer_give(struct buffer_pool *pool, struct pool_buffer *buffer)
{
    unsigned class = pool_class(buffer->capacity);

    assert(class < POOL_CLASSES);
    if (pool->retained + buffer->capacity > pool->retained_max) {
        pool_unmap(buffer);
        return;
    }
    pool->retained += buffer->capacity;
    buffer->next = pool->idle[class];
    pool->idle[class] = buffer;
}
