/* SPDX-License-Identifier: Apache-2.0
 *
 * The way in: bytes from the socket become requests, as far as the connection's bounds let them, and
 * plain ones begin at once. Also the connection's calls from Python.
 *
 * Payloads. One that has arrived whole is written straight from the receive buffer where the file
 * takes that, else from a buffer of its own. A small one that hasn't is left until it has; a big one
 * is received into its own buffer. One that is too long to take is dropped, so that the requests
 * behind it are heard. */

#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

/* Why parsing stopped, or that it needn't. */
enum nbd_stop_reason {
    NBD_BEGUN,        /* on to the next request */
    NBD_STOP_EMPTY,   /* no whole request is left */
    NBD_STOP_BOUND,   /* a bound has to fall */
    NBD_STOP_BUDGET,  /* others get their turn */
    NBD_STOP_PAYLOAD, /* a payload is on its way into its buffer, or to be dropped */
    NBD_STOP_END,     /* nothing more is heard */
};

/* What one pass may still do for this connection. */
struct nbd_budget {
    int64_t requests;
    int64_t bytes;
};

/* --- when to read --- */

/* Whether no more is begun because the client doesn't take its replies. */
static int nbd_backed_up(const struct nbd_connection *connection)
{
    return connection->blocked &&
           (connection->unsent_bytes >= connection->limits.unsent_bytes_max ||
            connection->unsent_parts >= connection->limits.unsent_parts_max);
}

/* Whether a request must wait for others to end. One alone never has to. */
static int nbd_must_wait(const struct nbd_connection *connection, unsigned command, uint64_t length)
{
    uint64_t held = connection->in_flight_bytes + connection->unsent_bytes;

    if (connection->in_flight >= connection->limits.in_flight_requests_max)
        return 1;
    if (held == 0 || (command != NBD_READ && command != NBD_WRITE))
        return 0;
    return length > connection->limits.in_flight_bytes_max ||
           held > connection->limits.in_flight_bytes_max - length;
}

static int nbd_hears(const struct nbd_connection *connection)
{
    return !connection->ended && !connection->closed && !connection->failed;
}

/* Tells epoll what the connection waits for. */
static void nbd_update_interest(struct nbd_connection *connection)
{
    uint32_t interest = 0;

    if (nbd_hears(connection) && !connection->paused && !connection->quiet)
        interest |= EPOLLIN;
    if (connection->blocked && !connection->closed && !connection->failed)
        interest |= EPOLLOUT;
    if (interest != connection->handler.interest)
        poll_interest(connection->poll, &connection->handler, interest);
}

static void nbd_set_paused(struct nbd_connection *connection, int paused)
{
    connection->paused = (uint8_t)paused;
    nbd_update_interest(connection);
}

/* A bound fell: go on in the next pass, if there was to stop. */
static void nbd_unpause(struct nbd_connection *connection)
{
    if (nbd_hears(connection) && !connection->quiet)
        poll_again(connection->poll, &connection->handler);
}

/* Nothing more is read, and a payload that is half there is forgotten. Python hears why, once. */
static void nbd_end(struct nbd_connection *connection, enum nbd_event why, uint64_t value)
{
    struct nbd_request *incoming = connection->incoming;

    if (connection->ended)
        return;
    connection->ended = 1;
    connection->incoming = NULL;
    connection->start = connection->end = 0;
    poll_post(connection->poll, connection->token, why, value);
    if (incoming != NULL)
        nbd_request_forget(incoming);
    nbd_update_interest(connection);
}

/* --- requests --- */

/* A request whose payload lies whole at `payload`. */
static void nbd_take_whole(struct nbd_request *request, const uint8_t *payload)
{
    struct nbd_connection *connection = request->connection;

    if (request->command == NBD_WRITE && nbd_write_in_place(connection, request, payload)) {
        nbd_reply(request);
        return;
    }
    if (nbd_request_buffer(request) != 0) {
        nbd_request_forget(request);
        nbd_end(connection, NBD_RECEIVE_FAILED, ENOMEM);
        return;
    }
    memcpy((void *)(uintptr_t)request->buffer->address, payload, request->length);
    if (request->command == NBD_WRITE)
        nbd_start_write(request);
    else
        nbd_fault(request);
}

/* A WRITE whose payload has yet to arrive, as far as `available` bytes aren't here. */
static enum nbd_stop_reason nbd_expect_payload(struct nbd_request *request, uint32_t available)
{
    struct nbd_connection *connection = request->connection;

    if (nbd_request_buffer(request) != 0) {
        nbd_request_forget(request);
        nbd_end(connection, NBD_RECEIVE_FAILED, ENOMEM);
        return NBD_STOP_END;
    }
    memcpy((void *)(uintptr_t)request->buffer->address, connection->received + connection->start,
           available);
    connection->start += available;
    connection->incoming = request;
    connection->incoming_bytes = available;
    return NBD_STOP_PAYLOAD;
}

/* A payload too long to take: it is dropped, then Python answers. */
static enum nbd_stop_reason nbd_drop_payload(struct nbd_request *request, uint32_t available)
{
    struct nbd_connection *connection = request->connection;
    uint64_t length = request->length;

    if (length > connection->limits.discard_length_max) {
        nbd_request_forget(request);
        nbd_end(connection, NBD_TOO_LONG, length);
        return NBD_STOP_END;
    }
    request->dropped = 1;
    if (available >= length) {
        connection->start += (uint32_t)length;
        nbd_fault(request);
        return NBD_BEGUN;
    }
    connection->start += available;
    connection->incoming = request;
    connection->incoming_bytes = length - available;
    return NBD_STOP_PAYLOAD;
}

/* A request with a payload, of which `available` bytes are here: all, or it is a big one. Only a
 * WRITE may have a big one; what a small one of another command says is Python's to understand. */
static enum nbd_stop_reason nbd_take_payload(struct nbd_request *request, uint32_t available)
{
    struct nbd_connection *connection = request->connection;
    const uint8_t *payload = connection->received + connection->start;
    uint64_t length_max = connection->limits.request_length_max;

    if (request->command != NBD_WRITE && length_max > NBD_WAIT_BYTES_MAX)
        length_max = NBD_WAIT_BYTES_MAX;
    if (request->length > length_max)
        return nbd_drop_payload(request, available);
    if (request->length == 0) {
        nbd_fault(request);
        return NBD_BEGUN;
    }
    if (available < request->length)
        return nbd_expect_payload(request, available);
    connection->start += (uint32_t)request->length;
    nbd_take_whole(request, payload);
    return NBD_BEGUN;
}

/* A request without a payload. */
static void nbd_take_other(struct nbd_request *request)
{
    struct nbd_connection *connection = request->connection;

    if (request->command == NBD_FLUSH) {
        nbd_start_flush(request);
    } else if (request->command != NBD_READ || request->length == 0 ||
               request->length > connection->limits.request_length_max) {
        nbd_fault(request);
    } else if (nbd_request_buffer(request) != 0) {
        nbd_request_forget(request);
        nbd_end(connection, NBD_RECEIVE_FAILED, ENOMEM);
    } else {
        nbd_start_read(request);
    }
}

/* Begins the request whose header lies at `start`. */
static enum nbd_stop_reason nbd_begin(struct nbd_connection *connection, struct nbd_budget *budget)
{
    const uint8_t *header = connection->received + connection->start;
    uint32_t header_bytes = nbd_header_bytes(connection->style);
    uint32_t available = connection->end - connection->start - header_bytes;
    unsigned command = nbd_get16(header + 6);
    uint64_t length = nbd_header_length(header, connection->style);
    int has_payload = nbd_has_payload(header, connection->style);
    struct nbd_request *request;

    if (nbd_get32(header) != nbd_request_magic(connection->style)) {
        nbd_end(connection, NBD_BAD_MAGIC, 0);
        return NBD_STOP_END;
    }
    if (command == NBD_DISC) {
        nbd_end(connection, NBD_DISCONNECT, 0);
        return NBD_STOP_END;
    }
    if (nbd_must_wait(connection, command, length))
        return NBD_STOP_BOUND;
    if (has_payload && available < length && length <= NBD_WAIT_BYTES_MAX)
        return NBD_STOP_EMPTY;
    request = nbd_request_new(connection);
    if (request == NULL) {
        nbd_end(connection, NBD_RECEIVE_FAILED, ENOMEM);
        return NBD_STOP_END;
    }
    nbd_read_header(request, header, (uint64_t)connection->poll->now_ns);
    connection->start += header_bytes;
    budget->requests--;
    if (has_payload) {
        budget->bytes -= length <= INT32_MAX ? (int64_t)length : INT32_MAX;
        return nbd_take_payload(request, available);
    }
    if (command == NBD_READ && length <= connection->limits.request_length_max &&
        connection->map != NULL && connection->map->io != MAP_IO_AIO)
        budget->bytes -= (int64_t)length;
    nbd_take_other(request);
    return NBD_BEGUN;
}

/* Begins requests until there is a reason to stop. */
static enum nbd_stop_reason nbd_parse(struct nbd_connection *connection)
{
    struct nbd_budget budget = {connection->limits.round_requests_max,
                                connection->limits.round_bytes_max};

    uint32_t header_bytes = nbd_header_bytes(connection->style);

    while (connection->end - connection->start >= header_bytes) {
        enum nbd_stop_reason reason;

        if (budget.requests <= 0 || budget.bytes <= 0)
            return NBD_STOP_BUDGET;
        if (nbd_backed_up(connection))
            return NBD_STOP_BOUND;
        reason = nbd_begin(connection, &budget);
        if (reason != NBD_BEGUN)
            return reason;
        if (!nbd_hears(connection))
            return NBD_STOP_END;
    }
    return NBD_STOP_EMPTY;
}

/* Begins what has arrived, and sees that the rest isn't forgotten. */
static void nbd_go_on(struct native_poll *poll, struct poll_handler *handler)
{
    struct nbd_connection *connection = (struct nbd_connection *)handler;
    enum nbd_stop_reason reason;

    if (!nbd_hears(connection) || connection->quiet)
        return;
    reason = connection->incoming != NULL ? NBD_STOP_PAYLOAD : nbd_parse(connection);
    if (reason == NBD_STOP_BUDGET)
        poll_again(poll, handler);
    nbd_set_paused(connection, reason == NBD_STOP_BOUND);
}

/* --- receiving --- */

/* Moves what isn't parsed to the front when a waiting payload might not fit behind it. */
static void nbd_make_room(struct nbd_connection *connection)
{
    uint32_t length = connection->end - connection->start;

    if (length != 0 && NBD_RECEIVE_BYTES - connection->end >= 2 * NBD_WAIT_BYTES_MAX)
        return;
    memmove(connection->received, connection->received + connection->start, length);
    connection->start = 0;
    connection->end = length;
}

/* Receives once, into the payload that is on its way and behind it, or into the receive buffer. */
static ssize_t nbd_receive(struct nbd_connection *connection)
{
    struct nbd_request *incoming = connection->incoming;
    uint8_t *rest = connection->received + connection->end;
    struct iovec parts[2];
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};

    if (incoming == NULL || incoming->dropped)
        return recv(connection->fd, rest, NBD_RECEIVE_BYTES - connection->end, MSG_DONTWAIT);
    parts[0].iov_base = (void *)(uintptr_t)(incoming->buffer->address + connection->incoming_bytes);
    parts[0].iov_len = incoming->length - connection->incoming_bytes;
    parts[1].iov_base = rest;
    parts[1].iov_len = NBD_LOOK_AHEAD_BYTES;
    return recvmsg(connection->fd, &message, MSG_DONTWAIT);
}

/* `count` bytes came: the first of them belong to the payload that is on its way. */
static void nbd_received(struct nbd_connection *connection, uint64_t count)
{
    struct nbd_request *incoming = connection->incoming;
    uint64_t missing, part;

    if (incoming == NULL) {
        connection->end += (uint32_t)count;
        return;
    }
    if (incoming->dropped) {
        part = count < connection->incoming_bytes ? count : connection->incoming_bytes;
        connection->end += (uint32_t)count;
        connection->start += (uint32_t)part;
        connection->incoming_bytes -= part;
        missing = connection->incoming_bytes;
    } else {
        missing = incoming->length - connection->incoming_bytes;
        part = count < missing ? count : missing;
        connection->incoming_bytes += part;
        connection->end += (uint32_t)(count - part);
        missing -= part;
    }
    if (missing != 0)
        return;
    connection->incoming = NULL;
    if (incoming->dropped)
        nbd_fault(incoming);
    else
        nbd_start_write(incoming);
}

/* See poll_handler.ready. */
static void nbd_ready(struct native_poll *poll, struct poll_handler *handler, uint32_t events)
{
    struct nbd_connection *connection = (struct nbd_connection *)handler;

    if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) && (handler->interest & EPOLLIN) &&
        !handler->is_again) {
        ssize_t count;

        nbd_make_room(connection);
        count = nbd_receive(connection);
        if (count > 0) {
            nbd_received(connection, (uint64_t)count);
            nbd_go_on(poll, handler);
        } else if (count == 0) {
            nbd_end(connection, NBD_END, 0);
        } else if (errno != EAGAIN && errno != EINTR) {
            nbd_end(connection, NBD_RECEIVE_FAILED, (uint64_t)errno);
        }
    }
    if ((events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) && (handler->interest & EPOLLOUT))
        nbd_send(connection);
}

/* See poll_handler.flush. */
static void nbd_flush_replies(struct native_poll *poll, struct poll_handler *handler)
{
    struct nbd_connection *connection = (struct nbd_connection *)handler;

    (void)poll;
    if (!connection->blocked)
        nbd_send(connection);
}

/* --- calls from Python --- */

/* Events that a connection may have posted and Python not taken: its faults, and its own. */
static uint32_t nbd_events_max(const struct nbd_limits *limits)
{
    return limits->in_flight_requests_max + 8;
}

struct nbd_connection *nbd_open(struct native_poll *poll, int32_t fd, uint64_t token,
                                const struct nbd_limits *limits, struct nbd_statistics *statistics,
                                int32_t style)
{
    struct nbd_connection *connection = calloc(1, sizeof *connection);

    if (connection == NULL)
        return NULL;
    connection->received = malloc(NBD_RECEIVE_BYTES);
    connection->handler.ready = nbd_ready;
    connection->handler.go_on = nbd_go_on;
    connection->handler.flush = nbd_flush_replies;
    connection->handler.fd = fd;
    connection->poll = poll;
    connection->statistics = statistics;
    connection->token = token;
    connection->limits = *limits;
    connection->fd = fd;
    connection->style = style;
    if (connection->received == NULL ||
        poll_add(poll, &connection->handler, nbd_events_max(limits)) < 0) {
        free(connection->received);
        free(connection);
        return NULL;
    }
    return connection;
}

void nbd_set_map(struct nbd_connection *connection, struct direct_map *map, int32_t writable)
{
    connection->map = map;
    connection->writable = writable;
}

void nbd_set_quiet(struct nbd_connection *connection, int32_t quiet)
{
    connection->quiet = (uint8_t)(quiet != 0);
    nbd_update_interest(connection);
    nbd_unpause(connection);
}

void nbd_resume(struct nbd_connection *connection)
{
    nbd_update_interest(connection);
    nbd_unpause(connection);
}

void nbd_stop(struct nbd_connection *connection)
{
    struct nbd_request *incoming = connection->incoming;

    connection->ended = 1;
    connection->stopping = 1;
    connection->incoming = NULL;
    connection->start = connection->end = 0;
    if (incoming != NULL)
        nbd_request_forget(incoming);
    nbd_update_interest(connection);
    nbd_check_answered(connection);
}

void nbd_close(struct nbd_connection *connection)
{
    struct nbd_request *incoming = connection->incoming;

    if (connection->closed)
        return;
    connection->closed = 1;
    connection->incoming = NULL;
    nbd_update_interest(connection);
    nbd_drop_replies(connection);
    if (incoming != NULL)
        nbd_request_forget(incoming);
    nbd_check_answered(connection);
}

void nbd_free(struct nbd_connection *connection)
{
    struct nbd_request *request;

    poll_remove(connection->poll, &connection->handler, nbd_events_max(&connection->limits));
    while ((request = connection->free) != NULL) {
        connection->free = request->next;
        free(request);
    }
    free(connection->received);
    free(connection);
}

int nbd_is_busy(const struct nbd_connection *connection)
{
    return connection->in_flight != 0 || connection->replies_first != NULL ||
           connection->incoming != NULL || connection->end != connection->start;
}
