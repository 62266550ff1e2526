/* SPDX-License-Identifier: Apache-2.0
 *
 * The C code of the daemon, in one translation unit and in the order of _transmission_build.py,
 * with a hand between the connection and what it stands on: memory is poisoned while it isn't
 * anybody's, host I/O is checked against what the map may say, and fails or waits when an input
 * wants it to.
 *
 * The hand is put in by the preprocessor: the code under test is the code that is shipped. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <sanitizer/asan_interface.h>

#define CHECK(condition)                                                                   \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            fprintf(stderr, "%s:%d: doesn't hold: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                       \
        }                                                                                  \
    } while (0)

#include "aio_queue.h"
#include "buffer_pool.h"
#include "poll.h"
#include "direct_map.h"
#include "transmission.h"

/* The sanitizer keeps its notes on memory that was unmapped, and would hold them against whoever is
 * given the same addresses next. */
static int unpoison_and_unmap(void *address, size_t length)
{
    ASAN_UNPOISON_MEMORY_REGION(address, length);
    return munmap(address, length);
}

#include "aio_queue.c"
#define munmap unpoison_and_unmap
#include "buffer_pool.c"
#undef munmap
#include "poll_aio.c"
#include "poll.c"
#include "direct_map.c"

/* --- what an input can have go wrong --- */

enum trouble {
    TROUBLE_NONE,
    TROUBLE_MEMORY,  /* the next buffers aren't to be had */
    TROUBLE_FAILURE, /* the next host I/Os fail */
    TROUBLE_SHORT,   /* the next host I/Os come back half done */
};

/* A request in the hands of the kernel, or held, and what it was before we had it go wrong. */
struct watched_io {
    struct poll_io *io;
    uint64_t length;
    int32_t fd;
    void (*done)(struct native_poll *poll, struct poll_io *io, int64_t result);
};

enum { STARTED_MAX = 1024 };

static struct {
    enum trouble next;
    uint32_t next_count; /* how often */
    uint64_t buffers_out;
    int holds_io;           /* AIO waits for release_io() */
    struct poll_io *held[STARTED_MAX];
    uint32_t held_count;
    struct watched_io started[STARTED_MAX]; /* of AIO, not done */
    uint32_t started_count;
} host;

/* nbd_model.h: whether the map may have said so. Aborts when it may not. */
static void check_host_access(int64_t offset, uint64_t length, int writable);

static int has_trouble(enum trouble trouble)
{
    if (host.next != trouble)
        return 0;
    if (--host.next_count == 0)
        host.next = TROUBLE_NONE;
    return 1;
}

/* --- memory --- */

static struct pool_buffer *watched_take(struct buffer_pool *pool, uint64_t length)
{
    struct pool_buffer *buffer;

    if (has_trouble(TROUBLE_MEMORY))
        return NULL;
    buffer = buffer_take(pool, length);
    CHECK(buffer != NULL && buffer->capacity >= length);
    CHECK(buffer->address % 4096 == 0);
    ASAN_POISON_MEMORY_REGION((void *)(uintptr_t)buffer->address, buffer->capacity);
    ASAN_UNPOISON_MEMORY_REGION((void *)(uintptr_t)buffer->address, length);
    memset((void *)(uintptr_t)buffer->address, 0xdb, length < 4096 ? length : 4096);
    host.buffers_out++;
    return buffer;
}

static void watched_give(struct buffer_pool *pool, struct pool_buffer *buffer)
{
    CHECK(host.buffers_out > 0);
    host.buffers_out--;
    ASAN_POISON_MEMORY_REGION((void *)(uintptr_t)buffer->address, buffer->capacity);
    buffer_give(pool, buffer);
}

/* --- host I/O on the spot --- */

/* What is left to do of `length` bytes, or -1 with errno. */
static int64_t spoil(uint64_t length)
{
    if (has_trouble(TROUBLE_FAILURE)) {
        errno = EIO;
        return -1;
    }
    return has_trouble(TROUBLE_SHORT) ? (int64_t)(length / 2) : (int64_t)length;
}

static ssize_t watched_pread(int fd, void *to, size_t length, off_t offset)
{
    int64_t count = spoil(length);

    check_host_access(offset, length, 0);
    return count <= 0 ? (ssize_t)count : pread(fd, to, (size_t)count, offset);
}

static ssize_t watched_preadv2(int fd, const struct iovec *parts, int count, off_t offset,
                               int flags)
{
    struct iovec part = parts[0];
    int64_t left = spoil(part.iov_len);

    CHECK(count == 1);
    check_host_access(offset, part.iov_len, 0);
    part.iov_len = (size_t)left;
    return left <= 0 ? (ssize_t)left : preadv2(fd, &part, 1, offset, flags);
}

static ssize_t watched_pwrite(int fd, const void *from, size_t length, off_t offset)
{
    int64_t count = spoil(length);

    check_host_access(offset, length, 1);
    return count <= 0 ? (ssize_t)count : pwrite(fd, from, (size_t)count, offset);
}

/* --- AIO --- */

static void watched_done(struct native_poll *poll, struct poll_io *io, int64_t result)
{
    for (uint32_t i = 0; i < host.started_count; i++) {
        struct watched_io found = host.started[i];

        if (found.io != io)
            continue;
        host.started[i] = host.started[--host.started_count];
        io->length = found.length;
        io->fd = found.fd;
        found.done(poll, io, result);
        return;
    }
    CHECK(0); /* done twice */
}

static void watched_io_start(struct native_poll *poll, struct poll_io *io)
{
    CHECK(io->opcode == IO_CMD_FDSYNC ? io->length == 0 && io->address == 0 : io->length > 0);
    if (io->opcode != IO_CMD_FDSYNC)
        check_host_access(io->offset, io->length, io->opcode == IO_CMD_PWRITE);
    CHECK(host.started_count < STARTED_MAX);
    host.started[host.started_count++] = (struct watched_io){io, io->length, io->fd, io->done};
    io->done = watched_done;
    if (has_trouble(TROUBLE_FAILURE))
        io->fd = -1; /* EBADF */
    else if (io->length > 0 && has_trouble(TROUBLE_SHORT))
        io->length /= 2;
    if (host.holds_io)
        host.held[host.held_count++] = io;
    else
        poll_io_start(poll, io);
}

/* Lets a held request go on to the kernel. Context: within a pass. */
static void release_io(struct native_poll *poll, uint32_t index)
{
    struct poll_io *io = host.held[index];

    host.held[index] = host.held[--host.held_count];
    poll_io_start(poll, io);
}

#define buffer_take watched_take
#define buffer_give watched_give
#define pread watched_pread
#define preadv2 watched_preadv2
#define pwrite watched_pwrite
#define poll_io_start watched_io_start
#include "connection.h"
#include "headers.c"
#include "requests.c"
#include "plain_io.c"
#include "replies.c"
#include "transmission.c"
#undef buffer_take
#undef buffer_give
#undef pread
#undef preadv2
#undef pwrite
#undef poll_io_start
