/* SPDX-License-Identifier: Apache-2.0
 *
 * A request's memory, and the ways in which it ends other than by a plain reply. */

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
    fault->retry = request->retry;
    fault->dropped = request->dropped;
    fault->error = request->error;
}

void nbd_finish(struct nbd_request *request, uint32_t error)
{
    if (request->connection->closed)
        nbd_request_forget(request);
    else
        nbd_reply_soon(request, error);
}
