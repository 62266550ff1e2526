/* SPDX-License-Identifier: Apache-2.0
 *
 * Headers of requests and heads of plain replies, in the three styles: reply_style.py says what
 * they are. What isn't a plain success is Python's to word (nbd_answer).
 *
 * Source: the NBD protocol, "Request message", "Structured reply chunk message", and "Extended reply
 * chunk message" of its branch extension-ext-header. */

#include <endian.h>
#include <stdint.h>
#include <string.h>

static uint16_t nbd_get16(const uint8_t *from)
{
    uint16_t value;

    memcpy(&value, from, sizeof value);
    return be16toh(value);
}

static uint32_t nbd_get32(const uint8_t *from)
{
    uint32_t value;

    memcpy(&value, from, sizeof value);
    return be32toh(value);
}

static uint64_t nbd_get64(const uint8_t *from)
{
    uint64_t value;

    memcpy(&value, from, sizeof value);
    return be64toh(value);
}

static void nbd_put32(uint8_t *to, uint32_t value)
{
    value = htobe32(value);
    memcpy(to, &value, sizeof value);
}

static void nbd_put64(uint8_t *to, uint64_t value)
{
    value = htobe64(value);
    memcpy(to, &value, sizeof value);
}

/* --- requests --- */

static uint32_t nbd_header_bytes(int style)
{
    return style == NBD_STYLE_EXTENDED ? NBD_EXTENDED_REQUEST_BYTES : NBD_REQUEST_BYTES;
}

static uint32_t nbd_request_magic(int style)
{
    return style == NBD_STYLE_EXTENDED ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC;
}

static uint64_t nbd_header_length(const uint8_t *header, int style)
{
    return style == NBD_STYLE_EXTENDED ? nbd_get64(header + 24) : nbd_get32(header + 24);
}

/* Whether the length in the header is that of a payload behind it. */
static int nbd_has_payload(const uint8_t *header, int style)
{
    if (style == NBD_STYLE_EXTENDED)
        return nbd_get16(header + 4) & NBD_FLAG_PAYLOAD_LEN;
    return nbd_get16(header + 6) == NBD_WRITE;
}

/* Fills in what the header says. PAYLOAD_LEN isn't among `flags` but in `has_payload`, so that plain
 * requests of all styles look alike from here on. */
static void nbd_read_header(struct nbd_request *request, const uint8_t *header, uint64_t now_ns)
{
    int style = request->connection->style;

    request->flags = nbd_get16(header + 4);
    request->has_payload = nbd_has_payload(header, style) != 0;
    if (style == NBD_STYLE_EXTENDED)
        request->flags &= (uint16_t)~NBD_FLAG_PAYLOAD_LEN;
    request->command = nbd_get16(header + 6);
    memcpy(request->cookie, header + 8, sizeof request->cookie);
    request->offset = nbd_get64(header + 16);
    request->length = nbd_header_length(header, style);
    request->started_ns = now_ns;
    request->retry = 0;
    request->dropped = 0;
    request->error = 0;
}

/* --- replies --- */

/* A reply, with no data behind it or a payload of `data_bytes`, that is the shortest there is for a
 * success: a READ's data as one chunk, DONE; else a simple reply where the style allows one. Returns
 * the bytes of the head. */
static uint32_t nbd_write_head(struct nbd_request *request)
{
    uint8_t *head = request->head;
    int style = request->connection->style;
    int is_read = request->command == NBD_READ;
    uint32_t kind = request->data_bytes != 0 ? NBD_CHUNK_DATA : NBD_CHUNK_NONE;
    uint64_t payload = request->data_bytes != 0 ? request->data_bytes + 8 : 0;

    memcpy(head + 8, request->cookie, sizeof request->cookie);
    if (style == NBD_STYLE_EXTENDED) {
        nbd_put32(head, NBD_EXTENDED_REPLY_MAGIC);
        nbd_put32(head + 4, NBD_CHUNK_DONE << 16 | kind);
        nbd_put64(head + 16, request->offset);
        nbd_put64(head + 24, payload);
        nbd_put64(head + 32, request->offset); /* part of the payload, if there is one */
        return payload != 0 ? 40 : 32;
    }
    if (style == NBD_STYLE_STRUCTURED && is_read) {
        nbd_put32(head, NBD_STRUCTURED_REPLY_MAGIC);
        nbd_put32(head + 4, NBD_CHUNK_DONE << 16 | kind);
        nbd_put32(head + 16, (uint32_t)payload);
        nbd_put64(head + 20, request->offset);
        return payload != 0 ? 28 : 20;
    }
    nbd_put32(head, NBD_SIMPLE_REPLY_MAGIC);
    nbd_put32(head + 4, 0);
    return NBD_REPLY_BYTES;
}
