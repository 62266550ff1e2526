/* SPDX-License-Identifier: Apache-2.0
 *
 * What must come out: the guest disk, the client's stream as an independent parser reads it, and
 * which bytes a READ may return.
 *
 * A READ may return, for each byte, what any WRITE put there that it may have met: one that wasn't
 * over, for the client, before another successful WRITE to that byte began, which was over before
 * the READ began. Time is counted in steps of the input: a request begins when the client has sent
 * its header and is over when the client has parsed its reply, which errs towards allowing more. */

enum {
    GUEST_BYTES = 512 << 10,
    PAGES_MAX = 1024, /* of 512 bytes */
    STREAM_MAX = 4 << 20,
    REQUESTS_MAX = 4096,
    CLIENTS = 2,
};

static uint64_t step; /* now */

/* --- the disk --- */

static struct {
    int fd;
    int io; /* enum map_io */
    uint32_t page_bits;
    uint32_t page_count;
    uint64_t page_bytes;
    struct direct_map *map;
    uint32_t host_page[PAGES_MAX]; /* of a guest page */
    uint32_t guest_page[PAGES_MAX]; /* of a host page */
    uint8_t published[PAGES_MAX];   /* 0, or 1 | writable << 1 */
} disk;

/* The file at the beginning of each input. */
static uint8_t base[GUEST_BYTES];

static uint64_t host_offset(uint64_t guest)
{
    return disk.host_page[guest / disk.page_bytes] * disk.page_bytes + guest % disk.page_bytes;
}

static int is_published(uint64_t page, int writable)
{
    return disk.published[page] & (writable ? 2 : 1);
}

static void check_host_access(int64_t offset, uint64_t length, int writable)
{
    uint64_t end = (uint64_t)offset + length;

    CHECK(!disk.map->held);
    CHECK(offset >= 0 && length > 0 && end <= GUEST_BYTES);
    CHECK((((uint64_t)offset | length) & disk.map->alignment_mask) == 0);
    for (uint64_t at = (uint64_t)offset, next; at < end; at = next) {
        uint32_t page = disk.guest_page[at / disk.page_bytes];

        next = at - at % disk.page_bytes + disk.page_bytes;
        if (next > end)
            next = end;
        CHECK(is_published(page, writable));
        CHECK(page * disk.page_bytes + (next - 1) % disk.page_bytes < disk.map->length);
    }
}

/* Whether the map must find the range: it is whole pages' host offsets that count. */
static int must_hit(uint64_t offset, uint64_t length, int writable)
{
    if (disk.map->held || length == 0 || length > disk.map->length ||
        offset > disk.map->length - length || ((offset | length) & disk.map->alignment_mask) != 0)
        return 0;
    for (uint64_t page = offset / disk.page_bytes, first = page;
         page * disk.page_bytes < offset + length; page++) {
        if (!is_published(page, writable))
            return 0;
        if (page > first && disk.host_page[page] != disk.host_page[page - 1] + 1)
            return 0;
    }
    return 1;
}

/* What the block graph does: any range of the guest, page by page. */
static void serve_by_graph(uint64_t offset, uint64_t length, uint8_t *memory, int writes)
{
    while (length > 0) {
        uint64_t part = disk.page_bytes - offset % disk.page_bytes;
        off_t at = (off_t)host_offset(offset);

        if (part > length)
            part = length;
        CHECK((writes ? pwrite(disk.fd, memory, part, at) : pread(disk.fd, memory, part, at)) ==
              (ssize_t)part);
        offset += part;
        memory += part;
        length -= part;
    }
}

/* --- the client's stream --- */

enum request_state { SENT_OR_NOT, FAULTED, FINISHED, REPLIED };

struct request {
    uint64_t offset;
    uint64_t header_at; /* in the stream */
    uint64_t end_at;
    uint64_t length;
    uint16_t command;
    uint16_t flags; /* as they were sent */
    uint8_t has_payload;
    uint8_t dropped;
    enum request_state state;
    uint32_t error;       /* which its fault was answered with */
    uint64_t sent_step;   /* 0: it isn't */
    uint64_t replied_step; /* 0: not yet */
};

struct client {
    int fd; /* -1: gone */
    struct nbd_limits limits;
    uint8_t stream[STREAM_MAX];
    uint32_t stream_length;
    uint32_t sent;
    uint64_t parsed;  /* where the next header begins, maybe beyond the stream */
    uint64_t end_at;  /* where what ends the stream can be told */
    uint64_t end_by;  /* where it must have been */
    int end;          /* enum nbd_event that a server says then, or 0 */
    int is_shut;      /* sends no more */
    struct request requests[REQUESTS_MAX];
    uint32_t request_count;
    uint32_t sent_count; /* of requests, in order, whose headers are sent */
    uint32_t replied_count;

    int style;         /* enum nbd_style */
    uint8_t head[32];  /* of the message that is coming in */
    uint32_t head_count;
    uint8_t payload[GUEST_BYTES + 64]; /* behind it */
    uint64_t payload_bytes, payload_count;
    struct request *reply_request; /* to whose reply more messages belong, or NULL */
    uint64_t data_count;           /* bytes of a READ that are there */
    uint32_t reply_error;
    uint8_t data[GUEST_BYTES];
};

static struct client clients[CLIENTS];

/* Cookies are put into the stream by this parser, so that all differ, and hold where to look. */
static uint64_t cookie_of(uint32_t index)
{
    return (index * UINT64_C(0x9E3779B97F4A7C15) & ~UINT64_C(0xffff)) | index;
}

static struct request *find_request(struct client *client, const uint8_t *cookie)
{
    uint64_t value = nbd_get64(cookie);
    uint32_t index = (uint32_t)(value & 0xffff);

    CHECK(index < client->request_count && value == cookie_of(index));
    return &client->requests[index];
}

static void stamp_cookie(struct client *client)
{
    uint64_t cookie = htobe64(cookie_of(client->request_count));

    for (uint32_t i = 0; i < sizeof cookie && client->parsed + 8 + i < client->stream_length; i++)
        client->stream[client->parsed + 8 + i] = ((const uint8_t *)&cookie)[i];
}

static uint32_t header_bytes(const struct client *client)
{
    return client->style == NBD_STYLE_EXTENDED ? 32 : 28;
}

static void stream_ends(struct client *client, enum nbd_event end)
{
    client->end = end;
    client->end_at = client->end_by = client->parsed + header_bytes(client);
}

/* Whether a payload is dropped: Python takes small ones of any command. */
static int is_dropped(const struct client *client, const struct request *request)
{
    uint64_t taken_max = client->limits.request_length_max;

    if (request->command != NBD_WRITE && taken_max > NBD_WAIT_BYTES_MAX)
        taken_max = NBD_WAIT_BYTES_MAX;
    return request->has_payload && request->length > taken_max;
}

/* Reads the header at `parsed`. */
static void note_request(struct client *client)
{
    const uint8_t *header = client->stream + client->parsed;
    struct request *request = &client->requests[client->request_count];
    int is_extended = client->style == NBD_STYLE_EXTENDED;

    *request = (struct request){
        .flags = nbd_get16(header + 4),
        .command = nbd_get16(header + 6),
        .offset = nbd_get64(header + 16),
        .length = is_extended ? nbd_get64(header + 24) : nbd_get32(header + 24),
        .header_at = client->parsed,
        .end_at = client->parsed + header_bytes(client),
    };
    request->has_payload = is_extended ? (request->flags & 32) != 0 : request->command == NBD_WRITE;
    request->dropped = (uint8_t)is_dropped(client, request);
    if (nbd_get32(header) != (is_extended ? 0x21e41c71u : 0x25609513u)) {
        stream_ends(client, NBD_BAD_MAGIC);
    } else if (request->command == NBD_DISC) {
        stream_ends(client, NBD_DISCONNECT);
    } else if (request->dropped && request->length > client->limits.discard_length_max) {
        stream_ends(client, NBD_TOO_LONG);
        if (request->length <= NBD_WAIT_BYTES_MAX) /* which are looked at when they are whole */
            client->end_by += request->length;
    } else {
        if (request->has_payload)
            request->end_at += request->length;
        client->parsed = request->end_at;
        client->request_count++;
    }
}

/* Adds to what the client is to send. 0 when there is no room for more. */
static int append(struct client *client, const void *bytes, uint32_t length)
{
    if (client->stream_length + length > STREAM_MAX ||
        client->request_count + length / NBD_REQUEST_BYTES + 1 >= REQUESTS_MAX)
        return 0;
    memcpy(client->stream + client->stream_length, bytes, length);
    client->stream_length += length;
    while (client->end == 0 && client->parsed < client->stream_length) {
        stamp_cookie(client);
        if (client->stream_length - client->parsed < header_bytes(client))
            break;
        note_request(client);
    }
    return 1;
}

/* `count` bytes more are with the server. */
static void note_sent(struct client *client, uint32_t count)
{
    client->sent += count;
    while (client->sent_count < client->request_count) {
        struct request *request = &client->requests[client->sent_count];

        if (request->header_at + header_bytes(client) > client->sent)
            break;
        request->sent_step = step;
        client->sent_count++;
    }
}

static int is_sent(const struct client *client, const struct request *request)
{
    return request->sent_step != 0 && request->end_at <= client->sent;
}

/* --- what a READ may return --- */

/* Bytes [at, end) of a READ, none of whose boundaries lies between: whether `write` may have put
 * `data` there; the first content of the file when `write` is NULL. */
static int could_be(const struct client *writer, const struct request *write, uint64_t at,
                    uint64_t end, const uint8_t *data)
{
    const uint8_t *content = base + host_offset(at);

    if (write != NULL)
        content = writer->stream + write->header_at + header_bytes(writer) + (at - write->offset);
    return memcmp(content, data, end - at) == 0;
}

static int covers(const struct request *write, uint64_t at)
{
    return write->command == NBD_WRITE && write->has_payload && !write->dropped && write->offset <= at &&
           at - write->offset < write->length;
}

/* When the last WRITE of `at` began that was over before the READ began; 0: there was none. */
static uint64_t settled_step(const struct request *read, uint64_t at)
{
    uint64_t found = 0;

    for (struct client *writer = clients; writer < clients + CLIENTS; writer++)
        for (uint32_t i = 0; i < writer->sent_count; i++) {
            const struct request *write = &writer->requests[i];

            if (covers(write, at) && write->state == REPLIED && write->error == 0 &&
                write->replied_step < read->sent_step && write->sent_step > found)
                found = write->sent_step;
        }
    return found;
}

static int is_legal(const struct request *read, uint64_t at, uint64_t end, const uint8_t *data)
{
    uint64_t settled = settled_step(read, at);

    if (settled == 0 && could_be(NULL, NULL, at, end, data))
        return 1;
    for (struct client *writer = clients; writer < clients + CLIENTS; writer++)
        for (uint32_t i = 0; i < writer->sent_count; i++) {
            const struct request *write = &writer->requests[i];

            if (covers(write, at) && is_sent(writer, write) &&
                (write->replied_step == 0 || write->replied_step >= settled) &&
                could_be(writer, write, at, end, data))
                return 1;
        }
    return 0;
}

/* Where the next stretch begins, of the pages and of the WRITEs that touch the READ. */
static uint64_t next_boundary(uint64_t at, uint64_t end)
{
    uint64_t page_end = at - at % disk.page_bytes + disk.page_bytes;

    if (page_end < end)
        end = page_end;
    for (struct client *writer = clients; writer < clients + CLIENTS; writer++)
        for (uint32_t i = 0; i < writer->sent_count; i++) {
            const struct request *write = &writer->requests[i];

            if (write->command != NBD_WRITE || !write->has_payload || write->dropped)
                continue;
            if (write->offset > at && write->offset < end)
                end = write->offset;
            if (covers(write, at) && write->length - (at - write->offset) < end - at)
                end = at + write->length - (at - write->offset);
        }
    return end;
}

static void check_data(const struct request *read, const uint8_t *data)
{
    uint64_t end = read->offset + read->length;
    uint64_t next;

    for (uint64_t at = read->offset; at < end; data += next - at, at = next) {
        next = next_boundary(at, end);
        if (is_legal(read, at, next, data))
            continue;
        for (uint64_t i = at; i < next; i++) /* WRITEs that overlapped in time may have mixed */
            CHECK(is_legal(read, i, i + 1, data + (i - at)));
    }
}
