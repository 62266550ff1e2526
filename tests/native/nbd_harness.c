/* SPDX-License-Identifier: Apache-2.0
 *
 * The native NBD connection against whatever a client may send and Python may do, whenever: one
 * input is one life of a poll, a map and one or two connections on real sockets and a real file.
 * The inputs' language is nbd_input.h; what a client may see is nbd_model.h, what Python may see
 * nbd_session.h; nbd_under_test.h compiles the code under test and watches its host I/O.
 *
 * A fuzzer calls LLVMFuzzerTestOneInput (libFuzzer, or nbd_random.c). What doesn't hold aborts. At
 * the end of each input everything is let go, and then must come to its end: what is owed is sent,
 * each connection says the events that its client has earned, once each, and nothing is left. */

#include <sched.h>
#include <sys/socket.h>

#include "nbd_under_test.h"

#include "nbd_model.h"

#include "nbd_replies.h"

#include "nbd_input.h"

#include "nbd_session.h"

enum {
    AIO_DEPTH = 4, /* few slots, so that requests wait for them */
    AIO_DEPTH_DEEP = 12,
    AIO_POLL_INPUTS = 256, /* making one anew takes milliseconds */
    IDLE_ROUNDS_MAX = 64,  /* rounds without progress, after which nothing more is to come */
    SMALL_BUFFER_BYTES = 4096,
    SLEEP_NS = 20000, /* epoll makes a millisecond of it */
};

#define AIO_WAIT_NS (INT64_C(20) * 1000000000) /* for an answer of the kernel's */

static struct nbd_limits const all_limits[] = {
    /* request, discard, in flight, parts, bytes in flight, unsent, requests and bytes per round,
     * answer to a BLOCK_STATUS */
    {256 << 10, 300 << 10, 16, 64, 512 << 10, 128 << 10, 16, 256 << 10, 2 << 10},
    {70 << 10, 140 << 10, 4, 8, 80 << 10, 20 << 10, 3, 64 << 10, 2 << 10},
    {8 << 10, 16 << 10, 2, 2, 6 << 10, 4 << 10, 1, 1, 2 << 10},
    {128 << 10, 64 << 10, 128, 512, 256 << 10, 64 << 10, 128, 2 << 20, 2 << 10},
};

/* --- the input --- */

struct input {
    const uint8_t *bytes;
    size_t left;
};

static uint8_t take_byte(struct input *input)
{
    if (input->left == 0)
        return 0;
    input->left--;
    return *input->bytes++;
}

/* Many small numbers, some big ones: 1 to 240 KiB. */
static uint32_t take_count(struct input *input)
{
    uint8_t byte = take_byte(input);

    return (1 + (byte & 15u)) << (byte >> 4 & 15u) >> (byte >> 4 > 13 ? 1 : 0);
}

/* --- what a client does --- */

static uint32_t client_write(struct client *client, uint32_t count)
{
    ssize_t sent;

    if (client->fd < 0 || client->is_shut)
        return 0;
    if (count > client->stream_length - client->sent)
        count = client->stream_length - client->sent;
    if (count == 0)
        return 0;
    sent = send(client->fd, client->stream + client->sent, count, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent > 0)
        note_sent(client, (uint32_t)sent);
    return sent > 0 ? (uint32_t)sent : 0;
}

static uint32_t client_read(struct client *client, uint32_t count)
{
    static uint8_t bytes[256 << 10];
    ssize_t got;

    if (client->fd < 0)
        return 0;
    got = recv(client->fd, bytes, count < sizeof bytes ? count : sizeof bytes, MSG_DONTWAIT);
    if (got > 0)
        parse_replies(client, bytes, (size_t)got);
    return got > 0 ? (uint32_t)got : 0;
}

static void client_leave(struct client *client)
{
    if (client->fd >= 0)
        close(client->fd);
    client->fd = -1;
    client->is_shut = 1;
}

static void put_header(const struct client *client, uint8_t *header, uint16_t flags,
                       uint16_t command, uint64_t offset, uint64_t length)
{
    int is_extended = client->style == NBD_STYLE_EXTENDED;
    const uint32_t magic = htobe32(is_extended ? 0x21e41c71u : 0x25609513u);
    const uint32_t short_length = htobe32((uint32_t)length);
    const uint64_t long_length = htobe64(length);

    flags = htobe16(flags);
    command = htobe16(command);
    offset = htobe64(offset);
    memcpy(header, &magic, 4);
    memcpy(header + 4, &flags, 2);
    memcpy(header + 6, &command, 2);
    memset(header + 8, 0, 8); /* stamp_cookie() */
    memcpy(header + 16, &offset, 8);
    memcpy(header + 24, is_extended ? (const void *)&long_length : &short_length,
           is_extended ? 8 : 4);
}

/* Whose bytes differ from other requests', nearly all. */
static const uint8_t *payload_of(uint32_t request)
{
    static uint8_t noise[(512 << 10) + 3 * REQUESTS_MAX];

    if (noise[0] == 0)
        for (uint32_t i = 0, state = 1; i < sizeof noise; i++) {
            state = state * 1103515245u + 12345u;
            noise[i] = (uint8_t)(state >> 16 | (i == 0));
        }
    return noise + 3 * request;
}

static void append_request(struct client *client, struct input *input, int damaged)
{
    static const uint16_t commands[] = {0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 3, 3, 4, 6, 5, 99};
    static const uint16_t all_flags[] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 0x8001};
    static const uint32_t lengths[] = {512, 4096, 1, 511, 8192, 16384, 1000, 61440, 4096, 65536,
                                       65537, 100000, 200000, 0, 300 << 10, UINT32_MAX};
    static uint8_t bytes[32 + (512 << 10)];
    uint32_t head = header_bytes(client);
    uint8_t what = take_byte(input), where = take_byte(input), how_much = take_byte(input);
    uint16_t command = what == 0xff ? NBD_DISC : commands[what & 15];
    uint64_t length = lengths[how_much & 15] + UINT64_C(512) * (how_much >> 4);
    uint16_t flags = all_flags[what >> 4];
    uint64_t offset = (where & 127) * UINT64_C(4096) + (where & 128 ? (how_much & 1 ? 1 : 512) : 0);

    if (where == 0xff)
        offset = UINT64_MAX - 100;
    else if (command == NBD_FLUSH && where < 0xc0)
        offset = length = 0;
    if (client->style == NBD_STYLE_EXTENDED) {
        if (length >= UINT32_MAX)
            length = how_much & 16 ? UINT64_MAX : UINT64_C(1) << 62;
        if ((command == NBD_WRITE) != (where == 0xfe)) /* nearly always as it should be */
            flags |= 32;
    } else {
        length &= UINT32_MAX;
    }
    put_header(client, bytes, flags, command, offset, length);
    if (damaged) {
        uint8_t place = take_byte(input) % head;

        bytes[place] = take_byte(input);
    }
    if ((client->style == NBD_STYLE_EXTENDED ? !(flags & 32) : command != NBD_WRITE) ||
        length > sizeof bytes - head)
        length = 0;
    memcpy(bytes + head, payload_of(client->request_count), length);
    append(client, bytes, head + (uint32_t)length);
}

static void append_raw(struct client *client, struct input *input)
{
    size_t length = take_byte(input);

    if (length > input->left)
        length = input->left;
    append(client, input->bytes, (uint32_t)length);
    input->bytes += length;
    input->left -= length;
}

/* --- one operation --- */

static void do_rare(uint32_t who, uint8_t which)
{
    struct session *session = &sessions[who];
    struct client *client = &clients[who];

    switch (which % RARE_COUNT) {
    case RARE_STOP: stop(session); break;
    case RARE_CLOSE: close_connection(session); break;
    case RARE_LEAVE: client_leave(client); break;
    case RARE_SHUT:
        if (client->fd >= 0)
            shutdown(client->fd, SHUT_WR);
        client->is_shut = 1;
        break;
    case RARE_CLEAR:
        direct_map_clear(disk.map);
        memset(disk.published, 0, sizeof disk.published);
        break;
    default: break;
    }
}

/* Python's side, and the host's. */
static void do_other(uint32_t who, unsigned operation, struct input *input)
{
    struct session *session = &sessions[who];
    uint8_t first = 0, second = 0;

    switch (operation) {
    case OP_FINISH:
        first = take_byte(input), second = take_byte(input);
        if (session->fault_count > 0)
            answer(who, first % session->fault_count, second & 1 ? 1 + second : 0, second >> 1);
        break;
    case OP_FINISH_ALL: answer_all(who); break;
    case OP_QUIET:
        session->is_quiet = !session->is_quiet;
        if (!session->is_closed)
            nbd_set_quiet(session->connection, session->is_quiet);
        break;
    case OP_SILENCE: native_poll_silence(poll_now, !poll_now->external_disabled); break;
    case OP_PUBLISH:
        first = take_byte(input), second = take_byte(input);
        publish((first | (second & 0x30) << 4) % disk.page_count, second & 1);
        break;
    case OP_WITHDRAW:
        first = take_byte(input), second = take_byte(input);
        withdraw(first, second & 1 ? UINT64_MAX : first + second);
        break;
    case OP_HOLD: disk.map->held = !disk.map->held; break;
    case OP_SET_MAP:
        first = take_byte(input);
        set_map((first & 3) != 0, first & 4);
        break;
    case OP_HOLD_IO: host.holds_io = !host.holds_io; break;
    case OP_RELEASE_IO:
        release_index = take_byte(input);
        poll_again(poll_now, &releaser);
        break;
    case OP_TROUBLE:
        first = take_byte(input);
        host.next = first & 3;
        host.next_count = 1 + (first >> 2 & 3);
        if (host.next == TROUBLE_MEMORY)
            sessions[0].had_trouble = sessions[1].had_trouble = 1;
        break;
    case OP_WAIT_IDLE:
        if (map_waits_for == 0 && direct_map_oldest(disk.map) != UINT64_MAX)
            map_waits_for = disk.map->watched = disk.map->serial;
        break;
    case OP_SLEEP: pass(SLEEP_NS); break;
    case OP_RARE: do_rare(who, take_byte(input)); break;
    default: CHECK(0);
    }
}

static void do_operation(struct input *input)
{
    uint8_t byte = take_byte(input);
    uint32_t who = byte & OP_CLIENT && session_count > 1;
    struct client *client = &clients[who];
    unsigned operation = (byte & 0x7fu) % OP_COUNT;

    step++;
    switch (operation) {
    case OP_REQUEST:
    case OP_REQUEST_2:
    case OP_REQUEST_3: append_request(client, input, 0); break;
    case OP_DAMAGED: append_request(client, input, 1); break;
    case OP_RAW: append_raw(client, input); break;
    case OP_WRITE: client_write(client, take_count(input)); break;
    case OP_WRITE_ALL: client_write(client, UINT32_MAX); break;
    case OP_PASS:
    case OP_PASS_2: pass(0); break;
    case OP_READ: client_read(client, take_count(input)); break;
    case OP_READ_ALL: client_read(client, UINT32_MAX); break;
    default: do_other(who, operation, input);
    }
}

/* --- the beginning --- */

/* Where guest pages lie in the file: in order, backwards, their halves swapped, or anywhere. */
static void lay_out(unsigned how)
{
    uint32_t count = disk.page_count, seed = 1;

    for (uint32_t page = 0; page < count; page++)
        disk.host_page[page] = how == 1   ? count - 1 - page
                               : how == 2 ? (page + count / 2) % count
                                          : page;
    for (uint32_t page = count - 1; how == 3 && page > 0; page--) {
        uint32_t other, kept = disk.host_page[page];

        seed = seed * 1103515245u + 12345u;
        other = (seed >> 16) % (page + 1);
        disk.host_page[page] = disk.host_page[other];
        disk.host_page[other] = kept;
    }
    for (uint32_t page = 0; page < count; page++)
        disk.guest_page[disk.host_page[page]] = page;
}

/* None, all, all but every fifth, or one stretch; in the third case some are read-only. */
static void publish_first(unsigned how)
{
    memset(disk.published, 0, sizeof disk.published);
    for (uint32_t page = 0; page < disk.page_count; page++)
        if (how == 1 || (how == 2 && page % 5 != 4) || (how == 3 && page >= disk.page_count / 3))
            publish(page, how != 2 || page % 3 != 2);
}

static void open_file(void)
{
    if (disk.fd == 0) {
        disk.fd = memfd_create("guest", MFD_CLOEXEC);
        CHECK(disk.fd > 0);
        for (uint32_t i = 0; i < GUEST_BYTES; i++)
            base[i] = (uint8_t)((i ^ i >> 8 ^ i >> 13) * 37);
    }
    CHECK(pwrite(disk.fd, base, GUEST_BYTES, 0) == GUEST_BYTES);
}

static void open_map(uint8_t first, uint8_t second, uint8_t third)
{
    static const uint32_t all_page_bits[] = {9, 12, 16, 19};
    static const uint32_t alignments[] = {1, 512, 512, 4096};
    uint32_t alignment = alignments[second >> 6];

    open_file();
    disk.io = MAP_IO_INLINE + (first & SET_KIND) % 3;
    disk.page_bits = all_page_bits[second >> 2 & 3];
    disk.page_bytes = UINT64_C(1) << disk.page_bits;
    disk.page_count = (uint32_t)(GUEST_BYTES >> disk.page_bits);
    if (alignment > disk.page_bytes)
        alignment = (uint32_t)disk.page_bytes;
    disk.map = direct_map_open(disk.fd, disk.io, disk.page_bits,
                               GUEST_BYTES - (third & 8 ? 12388 : 0), alignment, 4096,
                               (first & SET_DURABLE) != 0);
    CHECK(disk.map != NULL);
    disk.map->token = MAP_TOKEN;
    lay_out(second >> 4 & 3);
    publish_first(third & 3);
    disk.map->held = (first & SET_HELD) != 0;
    map_waits_for = 0;
}

static void open_poll(uint8_t third, uint8_t fourth)
{
    static unsigned inputs;
    int is_deep = (fourth & SET_DEEP) != 0;
    struct native_poll **poll = &polls[disk.io != MAP_IO_AIO ? 0 : 1 + is_deep];

    if (disk.io == MAP_IO_AIO && *poll != NULL && ++inputs % AIO_POLL_INPUTS == 0) {
        native_poll_close(*poll);
        *poll = NULL;
    }
    if (*poll == NULL) {
        CHECK(native_poll_open(poll) == 0);
        CHECK(disk.io != MAP_IO_AIO ||
              native_poll_open_aio(*poll, is_deep ? AIO_DEPTH_DEEP : AIO_DEPTH) == 0);
    }
    poll_now = *poll;
    poll_now->poll_ns = poll_now->poll_max_ns = third & SET_SPIN ? SLEEP_NS / 2 : 0;
    poll_now->buffers->retained_max = third & SET_SMALL_POOL ? 64 << 10 : 64 << 20;
    CHECK(native_poll_add_token(poll_now) == 0);
    memset(&releaser, 0, sizeof releaser);
    releaser.go_on = release_now;
}

static void open_client(struct client *client, const struct nbd_limits *limits, int fd)
{
    client->fd = fd;
    client->limits = *limits;
    client->stream_length = client->sent = 0;
    client->parsed = client->end_at = client->end_by = 0;
    client->end = client->is_shut = 0;
    client->request_count = client->sent_count = client->replied_count = 0;
    client->head_count = client->reply_error = 0;
    client->payload_bytes = client->payload_count = client->data_count = 0;
    client->reply_request = NULL;
}

static void open_connection(uint32_t who, const struct nbd_limits *limits, int has_small_buffer)
{
    struct session *session = &sessions[who];
    int fds[2], bytes = SMALL_BUFFER_BYTES;

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
    if (has_small_buffer)
        CHECK(setsockopt(fds[1], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes) == 0);
    open_client(&clients[who], limits, fds[0]);
    memset(session, 0, sizeof *session);
    session->fd = fds[1];
    session->connection = nbd_open(poll_now, fds[1], who + 1, limits, &session->statistics,
                                   clients[who].style);
    CHECK(session->connection != NULL);
    nbd_set_map(session->connection, has_map ? disk.map : NULL, is_writable);
    nbd_resume(session->connection);
}

/* Whether the input ends with everybody's leaving at once. */
static int begin(struct input *input)
{
    uint8_t first = take_byte(input), second = take_byte(input), third = take_byte(input);
    uint8_t fourth = take_byte(input);

    step = 1;
    memset(&host, 0, sizeof host);
    open_map(first, second, third);
    open_poll(third, fourth);
    host.holds_io = (third & SET_HOLD_IO) != 0;
    has_map = !(first & SET_NO_MAP);
    is_writable = !(first & SET_READ_ONLY);
    session_count = first & SET_TWO ? 2 : 1;
    clients[1].sent_count = clients[1].request_count = 0;
    clients[0].style = (fourth & SET_STYLE) / 8 % 3;
    clients[1].style = (clients[0].style + 1) % 3;
    for (uint32_t who = 0; who < session_count; who++)
        open_connection(who, &all_limits[second & 3], first & SET_SMALL_BUFFER);
    return (fourth & SET_ABRUPT) == SET_ABRUPT;
}

/* --- the end --- */

/* One round of everybody. Whether anything came of it. */
static int settle_once(void)
{
    uint64_t before = host.started_count, moved = 0;

    for (uint32_t who = 0; who < session_count; who++) {
        moved += client_write(&clients[who], UINT32_MAX);
        moved += sessions[who].fault_count;
        answer_all(who);
    }
    if (host.held_count > 0)
        poll_again(poll_now, &releaser);
    step++;
    pass(0);
    for (uint32_t who = 0; who < session_count; who++)
        moved += client_read(&clients[who], UINT32_MAX);
    return moved != 0 || host.started_count != before;
}

/* Lets everything come to its end. */
static void settle(void)
{
    int64_t until_ns = poll_clock() + AIO_WAIT_NS;

    for (uint32_t idle = 0; idle < IDLE_ROUNDS_MAX; idle++) {
        if (settle_once())
            idle = 0;
        if (host.started_count > 0) { /* the kernel's to finish */
            CHECK(poll_clock() < until_ns);
            idle = 0;
            sched_yield();
        }
    }
}

/* What isn't anybody's wish any more. */
static void let_go(void)
{
    host.next = TROUBLE_NONE;
    host.holds_io = 0;
    native_poll_silence(poll_now, 0);
    for (struct session *session = sessions; session < sessions + session_count; session++) {
        session->is_quiet = 0;
        if (!session->is_closed)
            nbd_set_quiet(session->connection, 0);
    }
}

/* All is settled, and `client` hasn't been stopped or cut off: it has got what it can expect. */
static void check_served(const struct session *session, const struct client *client)
{
    const struct nbd_counters *all[] = {&session->statistics.reads, &session->statistics.writes,
                                        &session->statistics.flushes};
    uint64_t counted = session->faults_taken;

    CHECK(client->sent == client->stream_length || client->is_shut || client->end != 0);
    for (uint32_t i = 0; i < client->sent_count; i++)
        CHECK(client->requests[i].state == REPLIED || client->requests[i].end_at > client->sent);
    if (client->end != 0 && client->end_by <= client->sent)
        CHECK(session->end == client->end);
    else if (client->end != 0 && client->end_at <= client->sent)
        CHECK(session->end == client->end || session->end == (client->is_shut ? NBD_END : 0));
    else if (client->is_shut)
        CHECK(session->end == NBD_END);
    else
        CHECK(session->end == 0);
    for (unsigned i = 0; i < 3; i++)
        counted += all[i]->requests;
    CHECK(counted == client->replied_count && session->statistics.faults == session->faults_taken);
}

static void check_settled(const struct session *session, const struct client *client)
{
    if (session->is_closed) {
        CHECK(session->is_released);
        return;
    }
    CHECK(session->connection->in_flight == (session->connection->incoming != NULL));
    if (client->fd < 0) {
        CHECK(session->is_stopped || session->end != 0 || session->has_failed);
        return;
    }
    CHECK(session->connection->replies_first == NULL && client->head_count == 0 &&
          client->payload_bytes == 0 && client->reply_request == NULL);
    for (uint32_t i = 0; i < client->sent_count; i++)
        CHECK(client->requests[i].state == REPLIED || client->requests[i].state == SENT_OR_NOT);
    if (session->is_stopped)
        CHECK(session->is_answered);
    else if (session->end != NBD_RECEIVE_FAILED)
        check_served(session, client);
}

/* Nothing is left of the input. */
static void end(void)
{
    for (uint32_t who = 0; who < session_count; who++) {
        close_connection(&sessions[who]);
        client_leave(&clients[who]);
    }
    let_go();
    settle();
    for (uint32_t who = 0; who < session_count; who++)
        CHECK(sessions[who].is_released);
    CHECK(host.buffers_out == 0 && host.started_count == 0 && host.held_count == 0);
    CHECK(map_waits_for == 0 && direct_map_oldest(disk.map) == UINT64_MAX);
    CHECK(poll_now->handler_count == 0 && poll_now->event_count == 0);
    CHECK(poll_now->again_first == NULL && poll_now->flush_first == NULL);
    native_poll_remove_token(poll_now);
    direct_map_close(disk.map);
    if (disk.io != MAP_IO_AIO) {
        native_poll_close(poll_now);
        polls[0] = NULL;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length)
{
    struct input input = {bytes, length};
    int is_abrupt = begin(&input);

    while (input.left > 0)
        do_operation(&input);
    if (!is_abrupt) {
        let_go();
        settle();
        for (uint32_t who = 0; who < session_count; who++)
            check_settled(&sessions[who], &clients[who]);
    }
    end();
    return 0;
}
