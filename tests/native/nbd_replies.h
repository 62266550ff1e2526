/* SPDX-License-Identifier: Apache-2.0
 *
 * Replies as a client reads them, in all three styles, and what Python words: errors, and READs in
 * several chunks. Neither shares code with what is tested.
 *
 * The messages of a reply follow one another, and its data comes in order: the protocol asks for
 * neither, but it is what we do. */

enum { CHUNK_NONE = 0, CHUNK_DATA = 1, CHUNK_HOLE = 2, CHUNK_ERROR = 0x8001 };

enum {
    SIMPLE_MAGIC = 0x67446698,
    STRUCTURED_MAGIC = 0x668e33ef,
    EXTENDED_MAGIC = 0x6e8a278c,
};

/* --- reading --- */

/* The request may be answered now, and by C alone only if it is plain: with a success. */
static void check_may_answer(const struct client *client, const struct request *request)
{
    uint16_t flags = request->flags;

    CHECK(is_sent(client, request));
    CHECK(request->state == SENT_OR_NOT || request->state == FINISHED); /* and so, once */
    if (request->state == FINISHED) {
        CHECK(client->reply_error == request->error);
        return;
    }
    if (client->style == NBD_STYLE_EXTENDED && request->command == NBD_WRITE)
        flags &= (uint16_t)~32u;
    CHECK(client->reply_error == 0 && !request->dropped);
    CHECK(request->command == NBD_READ || request->command == NBD_WRITE ||
          request->command == NBD_FLUSH);
    CHECK(flags == 0 ||
          (flags == NBD_FLAG_FUA && disk.map->durable && request->command != NBD_READ));
    CHECK(request->command != NBD_FLUSH || (request->offset == 0 && request->length == 0));
}

/* The reply has ended. */
static void take_reply(struct client *client, struct request *request)
{
    check_may_answer(client, request);
    if (client->reply_error == 0 && request->command == NBD_READ) {
        CHECK(client->data_count == request->length);
        check_data(request, client->data);
    }
    request->state = REPLIED;
    request->replied_step = step;
    client->replied_count++;
    client->reply_request = NULL;
    client->data_count = 0;
    client->reply_error = 0;
}

static void take_data(struct client *client, const uint8_t *data, uint64_t length)
{
    CHECK(length <= GUEST_BYTES - client->data_count);
    memcpy(client->data + client->data_count, data, length);
    client->data_count += length;
}

static void take_chunk(struct client *client, struct request *request)
{
    const uint8_t *payload = client->payload;
    uint64_t length = client->payload_bytes;
    unsigned flags = nbd_get16(client->head + 4), kind = nbd_get16(client->head + 6);

    CHECK(flags <= 1);
    CHECK(client->reply_request == NULL || client->reply_request == request);
    client->reply_request = request;
    if (client->style == NBD_STYLE_EXTENDED)
        CHECK(nbd_get64(client->head + 16) == request->offset);
    if (kind == CHUNK_DATA) {
        CHECK(request->command == NBD_READ && length > 8);
        CHECK(nbd_get64(payload) == request->offset + client->data_count);
        take_data(client, payload + 8, length - 8);
    } else if (kind == CHUNK_ERROR) {
        CHECK(length == 6u + nbd_get16(payload + 4));
        client->reply_error = nbd_get32(payload);
        CHECK(client->reply_error != 0);
    } else {
        CHECK(kind == CHUNK_NONE && flags == 1 && length == 0);
    }
    if (flags == 1)
        take_reply(client, request);
}

/* Head and payload are complete. */
static void take_message(struct client *client)
{
    struct request *request = find_request(client, client->head + 8);

    if (nbd_get32(client->head) == SIMPLE_MAGIC) {
        CHECK(client->reply_request == NULL);
        CHECK(client->style == NBD_STYLE_SIMPLE || request->command != NBD_READ);
        client->reply_error = nbd_get32(client->head + 4);
        take_data(client, client->payload, client->payload_bytes);
        take_reply(client, request);
    } else {
        take_chunk(client, request);
    }
    client->head_count = 0;
    client->payload_bytes = client->payload_count = 0;
}

/* How long the head will be, as far as can be told by now. */
static uint32_t head_bytes(const struct client *client)
{
    if (client->style == NBD_STYLE_EXTENDED)
        return 32;
    if (client->style == NBD_STYLE_STRUCTURED && client->head_count < 4)
        return 4;
    return client->style == NBD_STYLE_STRUCTURED && nbd_get32(client->head) != SIMPLE_MAGIC ? 20 : 16;
}

/* The head is complete: says how much follows. */
static void take_head(struct client *client)
{
    const struct request *request = find_request(client, client->head + 8);
    uint32_t magic = nbd_get32(client->head);

    if (client->style == NBD_STYLE_EXTENDED) {
        CHECK(magic == EXTENDED_MAGIC);
        client->payload_bytes = nbd_get64(client->head + 24);
    } else if (magic == STRUCTURED_MAGIC && client->style == NBD_STYLE_STRUCTURED) {
        client->payload_bytes = nbd_get32(client->head + 16);
    } else {
        CHECK(magic == SIMPLE_MAGIC);
        if (request->command == NBD_READ && nbd_get32(client->head + 4) == 0)
            client->payload_bytes = request->length;
    }
    CHECK(client->payload_bytes <= sizeof client->payload);
    if (client->payload_bytes == 0)
        take_message(client);
}

/* Bytes of the server's have come. */
static void parse_replies(struct client *client, const uint8_t *bytes, size_t length)
{
    while (length > 0) {
        int in_payload = client->payload_bytes > 0;
        uint64_t count = in_payload ? client->payload_count : client->head_count;
        uint64_t missing = (in_payload ? client->payload_bytes : head_bytes(client)) - count;
        size_t part = length < missing ? length : missing;

        memcpy((in_payload ? client->payload : client->head) + count, bytes, part);
        bytes += part;
        length -= part;
        if (in_payload) {
            client->payload_count += part;
            if (client->payload_count == client->payload_bytes)
                take_message(client);
        } else {
            client->head_count += (uint32_t)part;
            if (client->head_count == head_bytes(client))
                take_head(client);
        }
    }
}

/* --- wording --- */

enum { WORDED_PARTS_MAX = 2 * 5 + 1 };

/* A reply in the making. */
struct worded {
    uint8_t text[WORDED_PARTS_MAX * 48];
    uint32_t text_bytes;
    struct nbd_part parts[WORDED_PARTS_MAX];
    uint32_t count;
};

static void word_part(struct worded *worded, const void *from, uint64_t length)
{
    CHECK(worded->count < WORDED_PARTS_MAX);
    worded->parts[worded->count].address = (uint64_t)(uintptr_t)from;
    worded->parts[worded->count++].bytes = length;
}

static void word_number(struct worded *worded, uint64_t value, unsigned bytes)
{
    while (bytes-- > 0)
        worded->text[worded->text_bytes++] = (uint8_t)(value >> 8 * bytes);
}

static void word_chunk(struct worded *worded, int style, const struct nbd_fault *fault,
                       unsigned kind, int is_done, uint64_t payload)
{
    word_number(worded, style == NBD_STYLE_EXTENDED ? EXTENDED_MAGIC : STRUCTURED_MAGIC, 4);
    word_number(worded, (uint64_t)is_done, 2);
    word_number(worded, kind, 2);
    memcpy(worded->text + worded->text_bytes, &fault->cookie, 8);
    worded->text_bytes += 8;
    if (style == NBD_STYLE_EXTENDED)
        word_number(worded, fault->offset, 8);
    word_number(worded, payload, style == NBD_STYLE_EXTENDED ? 8 : 4);
}

static void word_error(struct worded *worded, int style, const struct nbd_fault *fault,
                       uint32_t error)
{
    if (style == NBD_STYLE_SIMPLE) {
        word_number(worded, SIMPLE_MAGIC, 4);
        word_number(worded, error, 4);
        memcpy(worded->text + worded->text_bytes, &fault->cookie, 8);
        worded->text_bytes += 8;
    } else {
        word_chunk(worded, style, fault, CHUNK_ERROR, 1, 8);
        word_number(worded, error, 4);
        word_number(worded, 2, 2);
        memcpy(worded->text + worded->text_bytes, "no", 2);
        worded->text_bytes += 2;
    }
    word_part(worded, worded->text, worded->text_bytes);
}

/* A READ in up to `pieces` chunks; with `has_end`, one without data comes last. */
static void word_read(struct worded *worded, int style, const struct nbd_fault *fault,
                      uint32_t pieces, int has_end)
{
    uint64_t done = 0, part = fault->length / pieces + 1;

    while (done < fault->length) {
        uint32_t begin = worded->text_bytes;
        uint64_t length = fault->length - done < part ? fault->length - done : part;

        word_chunk(worded, style, fault, CHUNK_DATA, !has_end && done + length == fault->length,
                   8 + length);
        word_number(worded, fault->offset + done, 8);
        word_part(worded, worded->text + begin, worded->text_bytes - begin);
        word_part(worded, (const uint8_t *)(uintptr_t)fault->address + done, length);
        done += length;
    }
    if (has_end) {
        uint32_t begin = worded->text_bytes;

        word_chunk(worded, style, fault, CHUNK_NONE, 1, 0);
        word_part(worded, worded->text + begin, worded->text_bytes - begin);
    }
}
