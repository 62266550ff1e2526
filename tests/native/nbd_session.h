/* SPDX-License-Identifier: Apache-2.0
 *
 * Python's part, played by the book (native_connection.py): it takes events, answers faults,
 * drains, changes the map, stops and closes. Each event is checked against what the client did to
 * earn it, and the connection's own books against the requests that it holds. */

#include <stddef.h>

enum { MAP_TOKEN = 99 };

/* What Python would know of a connection. */
struct session {
    struct nbd_connection *connection; /* NULL when it is freed */
    struct nbd_statistics statistics;
    int fd;
    int is_quiet;
    int is_stopped;
    int is_closed;
    int end; /* enum nbd_event, of those that end the stream */
    int has_failed;
    int is_answered;
    int is_released;
    int had_trouble; /* an end for want of memory is fine */
    struct nbd_request *faults[REQUESTS_MAX];
    uint32_t fault_count;
    uint64_t faults_taken;
    uint32_t start, end_of_received; /* what was received and not begun before the pass */
};

static struct session sessions[CLIENTS];
static uint32_t session_count;
static struct native_poll *polls[3]; /* those with AIO live on */
static struct native_poll *poll_now;
static struct poll_handler releaser; /* starts held AIO from within a pass */
static uint32_t release_index;
static int has_map, is_writable;
static uint64_t map_waits_for; /* serial; 0: Python doesn't wait */

/* --- what holds between any two passes --- */

static void check_replies(const struct nbd_connection *connection)
{
    uint64_t bytes = 0;
    uint32_t parts = 0;

    for (const struct nbd_request *r = connection->replies_first; r != NULL; r = r->next) {
        bytes += r->answer != NULL ? r->answer->bytes : r->head_bytes + r->data_bytes;
        parts += r->answer != NULL ? r->answer->count : 1 + (r->data_bytes != 0);
    }
    CHECK(connection->unsent_bytes == bytes - connection->head_sent);
    CHECK(connection->unsent_parts == parts);
    CHECK(connection->head_sent == 0 || connection->replies_first != NULL);
}

/* All that is in flight is a fault, pinned, or arriving, and so is the memory that it holds. */
static void check_in_flight(const struct session *session)
{
    const struct nbd_connection *connection = session->connection;
    uint32_t count = session->fault_count;
    uint64_t bytes = 0;

    for (uint32_t i = 0; i < session->fault_count; i++)
        bytes += nbd_bytes_held(session->faults[i]);
    for (struct map_pin *pin = disk.map->pins.next; pin != &disk.map->pins; pin = pin->next) {
        const uint8_t *at = (const uint8_t *)pin - offsetof(struct nbd_request, pin);
        const struct nbd_request *request = (const struct nbd_request *)at;

        if (request->connection == connection) {
            count++;
            bytes += nbd_bytes_held(request);
        }
    }
    if (connection->incoming != NULL) {
        count++;
        bytes += nbd_bytes_held(connection->incoming);
    }
    CHECK(connection->in_flight == count);
    CHECK(connection->in_flight_bytes == bytes);
}

static void check_session(const struct session *session)
{
    const struct nbd_connection *connection = session->connection;
    const struct nbd_limits *limits = &connection->limits;
    uint64_t bytes_max = limits->in_flight_bytes_max;

    check_replies(connection);
    check_in_flight(session);
    CHECK(connection->start <= connection->end && connection->end <= NBD_RECEIVE_BYTES);
    CHECK(connection->in_flight <= limits->in_flight_requests_max);
    if (bytes_max < limits->request_length_max)
        bytes_max = limits->request_length_max;
    bytes_max += limits->status_reply_bytes_max; /* of one that came alone, with a payload */
    CHECK(connection->in_flight_bytes <= bytes_max);
    if (session->is_answered && !session->is_closed)
        CHECK(!nbd_is_busy(connection));
}

/* --- events --- */

/* Whether C has all that it needs to serve a request by itself. By the page cache it never does. */
static int is_plain(const struct nbd_fault *fault, const struct client *client)
{
    int is_extended = client->style == NBD_STYLE_EXTENDED;

    if (disk.io == MAP_IO_NOWAIT || !has_map || fault->dropped ||
        fault->length > client->limits.request_length_max)
        return 0;
    return (fault->command == NBD_READ && fault->flags == 0 &&
            must_hit(fault->offset, fault->length, 0)) ||
           (fault->command == NBD_WRITE && fault->flags == (is_extended ? 32 : 0) && is_writable &&
            must_hit(fault->offset, fault->length, 1));
}

/* A fault must be what the client sent, and its memory must hold the payload. */
static void take_fault(struct session *session, struct client *client, struct nbd_request *native)
{
    struct request *request = find_request(client, native->cookie);
    struct nbd_fault fault;

    nbd_describe(native, &fault);
    CHECK(is_sent(client, request) && request->state == SENT_OR_NOT);
    CHECK(fault.offset == request->offset && fault.length == request->length &&
          fault.command == request->command && fault.flags == request->flags &&
          fault.dropped == request->dropped);
    CHECK(memcmp(&fault.cookie, native->cookie, 8) == 0);
    if (request->has_payload && fault.length > 0 && !fault.dropped) {
        CHECK(fault.address != 0);
        CHECK(memcmp((const void *)(uintptr_t)fault.address,
                     client->stream + request->header_at + header_bytes(client), fault.length) == 0);
    }
    CHECK(fault.retry || !is_plain(&fault, client));
    request->state = FAULTED;
    CHECK(session->fault_count < REQUESTS_MAX && !session->is_closed);
    session->faults[session->fault_count++] = native;
    session->faults_taken++;
}

static void take_end(struct session *session, const struct client *client, int what, uint64_t value)
{
    CHECK(session->end == 0 && !session->is_stopped && !session->is_closed);
    session->end = what;
    if (what == NBD_RECEIVE_FAILED) {
        CHECK((value == ENOMEM && session->had_trouble) || client->fd < 0);
    } else if (what == NBD_END) {
        CHECK(client->is_shut);
    } else {
        CHECK(what == client->end && client->end_at <= client->sent);
        if (what == NBD_TOO_LONG)
            CHECK(value > client->limits.discard_length_max);
    }
}

static void take_idle(void)
{
    CHECK(map_waits_for != 0 && disk.map->watched == 0);
    CHECK(direct_map_oldest(disk.map) > map_waits_for);
    map_waits_for = 0;
}

/* The last event of a connection. */
static void take_release(struct session *session)
{
    CHECK(session->is_closed && session->fault_count == 0);
    session->is_released = 1;
    nbd_free(session->connection);
    session->connection = NULL;
}

static void take_event(const struct poll_event *event)
{
    struct session *session;
    struct client *client;

    if (event->token == MAP_TOKEN) {
        take_idle();
        return;
    }
    CHECK(event->token >= 1 && event->token <= session_count);
    session = &sessions[event->token - 1];
    client = &clients[event->token - 1];
    CHECK(session->connection != NULL);
    if (event->what == NBD_FAULT) {
        take_fault(session, client, (struct nbd_request *)(uintptr_t)event->value);
    } else if (event->what == NBD_SEND_FAILED) {
        CHECK(!session->has_failed && client->fd < 0);
        session->has_failed = 1;
    } else if (event->what == NBD_ANSWERED) {
        CHECK(session->is_stopped && !session->is_answered && session->fault_count == 0);
        session->is_answered = 1;
    } else if (event->what == NBD_RELEASED) {
        take_release(session);
    } else {
        take_end(session, client, (int)event->what, event->value);
    }
}

/* Takes what is posted, as Python does: all of it first. */
static void take_events(void)
{
    static struct poll_event events[2048];
    uint32_t count = poll_now->event_count;

    CHECK(count <= poll_now->event_capacity && count <= sizeof events / sizeof events[0]);
    memcpy(events, poll_now->events, count * sizeof events[0]);
    poll_now->event_count = 0;
    for (uint32_t i = 0; i < count; i++)
        take_event(&events[i]);
    for (struct session *session = sessions; session < sessions + session_count; session++)
        if (session->connection != NULL)
            check_session(session);
}

static void note_received(void)
{
    for (struct session *session = sessions; session < sessions + session_count; session++)
        if (session->connection != NULL) {
            session->start = session->connection->start;
            session->end_of_received = session->connection->end;
        }
}

/* In a drained section no request is begun, and nothing is received. */
static void check_silence(void)
{
    for (struct session *session = sessions; session < sessions + session_count; session++)
        if (session->connection != NULL && (session->is_quiet || poll_now->external_disabled))
            CHECK(session->start == session->connection->start &&
                  session->end_of_received == session->connection->end);
}

static void pass(int64_t timeout_ns)
{
    int result;

    note_received();
    result = native_poll_wait(poll_now, timeout_ns);
    step++;
    CHECK(result == -EINTR || result == (int)(poll_now->ready_count + poll_now->event_count));
    CHECK(poll_now->ready_count == 0); /* Python watches nothing here */
    check_silence();
    take_events();
}

/* See poll_handler.go_on. */
static void release_now(struct native_poll *poll, struct poll_handler *handler)
{
    (void)handler;
    if (host.held_count > 0)
        release_io(poll, release_index % host.held_count);
}

/* --- what Python does --- */

/* A fault is answered: as the graph would where `error` is 0 and it can. `how` is for a READ: in
 * how many chunks, where chunks there are, and how they end. */
static void answer(uint32_t who, uint32_t which, uint32_t error, unsigned how)
{
    struct session *session = &sessions[who];
    struct nbd_request *native = session->faults[which];
    struct request *request = find_request(&clients[who], native->cookie);
    int style = clients[who].style;
    struct worded worded = {.count = 0};
    struct nbd_fault fault;

    nbd_describe(native, &fault);
    if (error == 0 && fault.length > 0 && fault.command <= NBD_WRITE) {
        if (fault.address == 0 || fault.length > GUEST_BYTES ||
            fault.offset > GUEST_BYTES - fault.length ||
            (fault.command == NBD_READ) == request->has_payload)
            error = 22;
        else
            serve_by_graph(fault.offset, fault.length, (uint8_t *)(uintptr_t)fault.address,
                           fault.command == NBD_WRITE);
    }
    session->faults[which] = session->faults[--session->fault_count];
    CHECK(request->state == FAULTED);
    request->state = FINISHED;
    request->error = error;
    if (error != 0)
        word_error(&worded, style, &fault, error);
    else if (style != NBD_STYLE_SIMPLE && fault.command == NBD_READ && fault.length > 0 && how & 1)
        word_read(&worded, style, &fault, 1 + (how >> 2) % 5, how & 2);
    if (worded.count > 0)
        CHECK(nbd_answer(native, worded.parts, worded.count) == 0);
    else
        nbd_finish(native);
}

static void answer_all(uint32_t who)
{
    while (sessions[who].fault_count > 0)
        answer(who, sessions[who].fault_count - 1, 0, sessions[who].fault_count);
}

static void stop(struct session *session)
{
    if (session->is_closed)
        return;
    session->is_stopped = 1;
    nbd_stop(session->connection);
}

static void close_connection(struct session *session)
{
    if (session->is_closed)
        return;
    session->is_closed = 1;
    nbd_close(session->connection);
    close(session->fd); /* as native_connection.py: before nbd_free */
}

static void publish(uint64_t page, int writable)
{
    uint64_t host_page = disk.host_page[page] * disk.page_bytes;

    CHECK(direct_map_publish(disk.map, page, host_page << 1 | (uint64_t)writable) == 0);
    disk.published[page] = (uint8_t)(1 | writable << 1);
}

static void withdraw(uint64_t first, uint64_t last)
{
    direct_map_withdraw(disk.map, first, last);
    for (uint64_t page = first; page <= last && page < disk.page_count; page++)
        disk.published[page] = 0;
}

static void set_map(int exists, int writable)
{
    has_map = exists;
    is_writable = writable;
    for (struct session *session = sessions; session < sessions + session_count; session++)
        if (session->connection != NULL && !session->is_closed)
            nbd_set_map(session->connection, exists ? disk.map : NULL, writable);
}
