/* SPDX-License-Identifier: Apache-2.0
 *
 * A request's memory, and the ways in which it ends other than by a plain reply. */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* A request in flight of no command yet, or NULL when there is no memory. Used again last in, first
 * out; a connection keeps as many as it ever had at once, which its limits bound. */
static struct nbd_request *nbd_request_new(struct nbd_connection *connection)
{
    struct nbd_request *request = connection->free;

    if (request != NULL) {
        connection->free = request->next;
    } else {
        request = calloc(1, sizeof *request);
        if (request == NULL)
            return NULL;
        request->connection = connection;
    }
    connection->in_flight++;
    return request;
}

/* The request is over, and so is its reply, if it had one. It isn't in flight any more. */
static void nbd_request_release(struct nbd_request *request)
{
    struct nbd_connection *connection = request->connection;

    if (request->buffer != NULL) {
        buffer_give(connection->poll->buffers, request->buffer);
        request->buffer = NULL;
    }
    if (request->answer != NULL) {
        free(request->answer);
        request->answer = NULL;
    }
    request->next = connection->free;
    connection->free = request;
}

/* Memory for the data of a READ or WRITE, which counts against the connection's bound while the
 * request is in flight. 0, or -1 when there is none. */
static int nbd_request_buffer(struct nbd_request *request)
{
    struct nbd_connection *connection = request->connection;

    request->buffer = buffer_take(connection->poll->buffers, request->length);
    if (request->buffer == NULL)
        return -1;
    connection->in_flight_bytes += request->length;
    return 0;
}

static uint64_t nbd_bytes_held(const struct nbd_request *request)
{
    return request->buffer != NULL ? request->length : 0;
}

/* It is in flight no more, and gets no answer. */
static void nbd_request_forget(struct nbd_request *request)
{
    struct nbd_connection *connection = request->connection;

    connection->in_flight--;
    connection->in_flight_bytes -= nbd_bytes_held(request);
    nbd_request_release(request);
    nbd_check_answered(connection);
}

/* Hands the request to Python, which answers it by nbd_finish. */
static void nbd_fault(struct nbd_request *request)
{
    struct nbd_connection *connection = request->connection;

    connection->statistics->faults++;
    poll_post(connection->poll, connection->token, NBD_FAULT, (uint64_t)(uintptr_t)request);
}

void nbd_describe(const struct nbd_request *request, struct nbd_fault *fault)
{
    fault->offset = request->offset;
    fault->address = request->buffer != NULL ? request->buffer->address : 0;
    fault->length = request->length;
    fault->command = request->command;
    fault->flags = request->flags;
    if (request->has_payload && request->connection->style == NBD_STYLE_EXTENDED)
        fault->flags |= NBD_FLAG_PAYLOAD_LEN;
    fault->retry = request->retry;
    fault->dropped = request->dropped;
    fault->error = request->error;
    memcpy(&fault->cookie, request->cookie, sizeof fault->cookie);
}

void nbd_finish(struct nbd_request *request)
{
    if (request->connection->closed)
        nbd_request_forget(request);
    else
        nbd_reply_soon(request);
}

/* Whether a part lies in the request's own memory, which lives as long as the reply. */
static int nbd_is_own(const struct nbd_request *request, const struct nbd_part *part)
{
    return request->buffer != NULL && part->address >= request->buffer->address &&
           part->address - request->buffer->address < request->length;
}

int nbd_answer(struct nbd_request *request, const struct nbd_part *parts, uint32_t count)
{
    struct nbd_answer *answer;
    uint64_t text_bytes = 0;
    uint8_t *text;

    if (request->connection->closed) {
        nbd_request_forget(request);
        return 0;
    }
    for (uint32_t i = 0; i < count; i++)
        if (!nbd_is_own(request, &parts[i]))
            text_bytes += parts[i].bytes;
    answer = malloc(sizeof *answer + count * sizeof answer->parts[0] + text_bytes);
    if (answer == NULL)
        return -ENOMEM;
    answer->bytes = 0;
    answer->count = count;
    text = (uint8_t *)&answer->parts[count];
    for (uint32_t i = 0; i < count; i++) {
        void *from = (void *)(uintptr_t)parts[i].address;

        answer->parts[i].iov_len = parts[i].bytes;
        answer->bytes += parts[i].bytes;
        if (nbd_is_own(request, &parts[i])) {
            answer->parts[i].iov_base = from;
        } else {
            answer->parts[i].iov_base = memcpy(text, from, parts[i].bytes);
            text += parts[i].bytes;
        }
    }
    request->answer = answer;
    nbd_reply_soon(request);
    return 0;
}
