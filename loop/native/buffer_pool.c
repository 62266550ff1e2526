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

#define HUGE_BYTES (UINT64_C(2) << 20)

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

static void *pool_pages(uint64_t length)
{
    void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    return memory == MAP_FAILED ? NULL : memory;
}

/* Memory that begins on a huge page; what lies around it is given back. */
static void *pool_huge_pages(uint64_t length)
{
    char *memory = pool_pages(length + HUGE_BYTES);
    uint64_t before;

    if (memory == NULL)
        return NULL;
    before = -(uint64_t)(uintptr_t)memory & (HUGE_BYTES - 1);
    if (before != 0)
        munmap(memory, before);
    if (before != HUGE_BYTES)
        munmap(memory + before + length, HUGE_BYTES - before);
    memory += before;
    /* Advice: a kernel without huge pages does without. A child's copy on write could take a page
     * away from under a transfer. */
    madvise(memory, length, MADV_HUGEPAGE);
    madvise(memory, length, MADV_DONTFORK);
    return memory;
}

/* Takes the memory over, which is given back where that fails. */
static struct pool_buffer *pool_wrap(void *memory, uint64_t capacity)
{
    struct pool_buffer *buffer;

    if (memory == NULL)
        return NULL;
    buffer = malloc(sizeof *buffer);
    if (buffer == NULL) {
        munmap(memory, capacity);
        return NULL;
    }
    buffer->next = NULL;
    buffer->address = (uint64_t)(uintptr_t)memory;
    buffer->capacity = capacity;
    return buffer;
}

static struct pool_buffer *pool_map(struct buffer_pool *pool, uint64_t capacity)
{
    struct pool_buffer *twin;
    char *memory;

    if (capacity < HUGE_BYTES / 2)
        return pool_wrap(pool_pages(capacity), capacity);
    if (capacity >= HUGE_BYTES)
        return pool_wrap(pool_huge_pages(capacity), capacity);
    memory = pool_huge_pages(HUGE_BYTES);
    if (memory == NULL)
        return NULL;
    twin = pool_wrap(memory + capacity, capacity);
    if (twin != NULL)
        buffer_give(pool, twin);
    return pool_wrap(memory, capacity);
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
        return pool_map(pool, UINT64_C(1) << (class + POOL_BITS_MIN));
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
