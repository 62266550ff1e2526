/* SPDX-License-Identifier: Apache-2.0
 *
 * Plain requests between the direct map and the host file. What goes wrong here is never an answer:
 * it becomes a fault with `retry`, and the block graph decides what it means. So a native request
 * fails as a Python one does. */

#include <errno.h>
#include <libaio.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef RWF_NOWAIT
#define RWF_NOWAIT 8
#endif
#ifndef RWF_DSYNC
#define RWF_DSYNC 2
#endif

/* Counts a request that ends well now. */
static void nbd_count(struct nbd_counters *counters, uint64_t bytes, uint64_t started_ns)
{
    struct timespec now;
    uint64_t took_ns;
    unsigned bucket;

    clock_gettime(CLOCK_MONOTONIC, &now);
    took_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec - started_ns;
    bucket = took_ns == 0 ? 0 : 64u - (unsigned)__builtin_clzll(took_ns);
    counters->requests++;
    counters->bytes += bytes;
    counters->latency_ns += took_ns;
    counters->latency[bucket < NBD_LATENCY_BUCKETS ? bucket : NBD_LATENCY_BUCKETS - 1]++;
}

static struct nbd_counters *nbd_counters_of(const struct nbd_request *request)
{
    struct nbd_statistics *statistics = request->connection->statistics;

    return request->command == NBD_READ    ? &statistics->reads
           : request->command == NBD_WRITE ? &statistics->writes
                                           : &statistics->flushes;
}

/* The host's answer is the whole of what was asked: reply. */
static void nbd_succeed(struct nbd_request *request)
{
    nbd_count(nbd_counters_of(request), request->length, request->started_ns);
    nbd_reply(request);
}

/* The host refused, with -errno, or came back short: the graph is to do it again, and to say what is
 * wrong. Reads and writes may be repeated. A failed flush may not, but for a kernel that has none of
 * this kind: it could succeed the second time although the data is gone. */
static void nbd_go_wrong(struct nbd_request *request, int64_t result)
{
    nbd_counters_of(request)->failures++;
    request->retry = 1;
    if (request->command == NBD_FLUSH && result < 0 && result != -EINVAL && result != -EAGAIN &&
        result != -EOPNOTSUPP)
        request->error = (uint16_t)-result;
    nbd_fault(request);
}

/* Linux AIO has finished with the request; see poll_io.done. */
static void nbd_io_done(struct native_poll *poll, struct poll_io *io, int64_t result)
{
    struct nbd_request *request = (struct nbd_request *)io;
    struct nbd_connection *connection = request->connection;
    struct direct_map *map = request->map;

    request->map = NULL;
    if (direct_map_unpin(map, &request->pin))
        poll_post(poll, map->token, 1, 0);
    if (connection->closed) {
        nbd_request_forget(request);
    } else if (result == (int64_t)io->length) {
        nbd_count(nbd_counters_of(request), request->length, request->started_ns);
        nbd_reply_soon(request);
    } else {
        nbd_go_wrong(request, result);
    }
}

/* Begins the host I/O of a request; the pin keeps what the map said true until it is done. */
static void nbd_start_aio(struct nbd_request *request, struct direct_map *map, int opcode,
                          int64_t host, uint64_t length, int rw_flags)
{
    struct poll_io *io = &request->io;

    request->map = map;
    direct_map_pin(map, &request->pin);
    io->address = request->buffer != NULL ? request->buffer->address : 0;
    io->length = length;
    io->offset = host;
    io->fd = map->fd;
    io->rw_flags = rw_flags;
    io->opcode = opcode;
    io->done = nbd_io_done;
    poll_io_start(request->connection->poll, io);
}

/* A READ with its buffer: answers it, begins its I/O, or makes it a fault. */
static void nbd_start_read(struct nbd_request *request)
{
    const struct nbd_connection *connection = request->connection;
    struct direct_map *map = connection->map;
    int64_t host;
    ssize_t count;

    if (map == NULL || request->flags != 0 ||
        (host = direct_map_find(map, request->offset, request->length, 0)) < 0) {
        nbd_fault(request);
        return;
    }
    if (map->io == MAP_IO_AIO) {
        nbd_start_aio(request, map, IO_CMD_PREAD, host, request->length, 0);
        return;
    }
    if (map->io == MAP_IO_NOWAIT) {
        struct iovec all = {(void *)(uintptr_t)request->buffer->address, request->length};

        count = preadv2(map->fd, &all, 1, host, RWF_NOWAIT);
    } else {
        count = pread(map->fd, (void *)(uintptr_t)request->buffer->address, request->length, host);
    }
    if (count == (ssize_t)request->length)
        nbd_succeed(request);
    else if (map->io == MAP_IO_NOWAIT)
        nbd_fault(request); /* not in the page cache: a worker may wait for it */
    else
        nbd_go_wrong(request, 0);
}

/* Where a WRITE may go natively, or -1. */
static int64_t nbd_find_writable(const struct nbd_connection *connection,
                                 const struct nbd_request *request)
{
    const struct direct_map *map = connection->map;

    if (map == NULL || !connection->writable || map->io == MAP_IO_NOWAIT)
        return -1;
    if (request->flags != 0 && !(request->flags == NBD_FLAG_FUA && map->durable))
        return -1;
    return direct_map_find(map, request->offset, request->length, 1);
}

/* Writes a payload from where it was received, if the file takes that and it works. 1 when it is
 * written; the caller answers. `header` describes the request and is not in flight. */
static int nbd_write_in_place(struct nbd_connection *connection, const struct nbd_request *header,
                              const uint8_t *payload)
{
    const struct direct_map *map = connection->map;
    int64_t host;

    if (map == NULL || map->io != MAP_IO_INLINE ||
        (host = nbd_find_writable(connection, header)) < 0)
        return 0;
    if (pwrite(map->fd, payload, header->length, host) != (ssize_t)header->length)
        return 0; /* tried again from a buffer, where it may fail for good */
    nbd_count(&connection->statistics->writes, header->length, header->started_ns);
    return 1;
}

/* A WRITE with its payload in its buffer. */
static void nbd_start_write(struct nbd_request *request)
{
    const struct nbd_connection *connection = request->connection;
    int64_t host = nbd_find_writable(connection, request);
    struct direct_map *map = connection->map;

    if (host < 0)
        nbd_fault(request);
    else if (map->io == MAP_IO_AIO)
        nbd_start_aio(request, map, IO_CMD_PWRITE, host, request->length,
                      request->flags & NBD_FLAG_FUA ? RWF_DSYNC : 0);
    else if (pwrite(map->fd, (const void *)(uintptr_t)request->buffer->address, request->length,
                    host) == (ssize_t)request->length)
        nbd_succeed(request);
    else
        nbd_go_wrong(request, 0);
}

/* A FLUSH: what stands behind the map is the file alone, or the graph has to do it. */
static void nbd_start_flush(struct nbd_request *request)
{
    const struct nbd_connection *connection = request->connection;
    struct direct_map *map = connection->map;

    if (map == NULL || map->held || !map->durable || !connection->writable ||
        (request->flags & ~NBD_FLAG_FUA) != 0 || request->offset != 0 || request->length != 0 ||
        map->io == MAP_IO_NOWAIT)
        nbd_fault(request);
    else if (map->io == MAP_IO_AIO)
        nbd_start_aio(request, map, IO_CMD_FDSYNC, 0, 0, 0);
    else
        nbd_succeed(request); /* a memory filesystem: there is nothing behind it */
}
