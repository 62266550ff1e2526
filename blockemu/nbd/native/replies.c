/* SPDX-License-Identifier: Apache-2.0
 *
 * Replies on their way out: in the order in which requests end, many in one sendmsg, partly when the
 * socket is full. A request and its buffer live until the kernel has taken the last byte. */

#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

static void nbd_put32(uint8_t *to, uint32_t value)
{
    value = htobe32(value);
    memcpy(to, &value, sizeof value);
}

/* The request is over: its reply joins the queue. Source: "Simple reply message". */
static void nbd_reply(struct nbd_request *request, uint32_t error)
{
    struct nbd_connection *connection = request->connection;

    connection->in_flight--;
    connection->in_flight_bytes -= nbd_bytes_held(request);
    nbd_put32(request->reply, NBD_SIMPLE_REPLY_MAGIC);
    nbd_put32(request->reply + 4, error);
    memcpy(request->reply + 8, request->cookie, sizeof request->cookie);
    request->data_bytes = error == 0 && request->command == NBD_READ ? request->length : 0;
    request->next = NULL;
    if (connection->replies_first == NULL)
        connection->replies_first = request;
    else
        connection->replies_last->next = request;
    connection->replies_last = request;
    connection->unsent_bytes += NBD_REPLY_BYTES + request->data_bytes;
    connection->unsent_parts += 1 + (request->data_bytes != 0);
    if (connection->paused)
        nbd_unpause(connection);
    if (connection->blocked)
        return;
    if (connection->unsent_bytes >= NBD_EARLY_BYTES)
        nbd_send(connection);
    else
        poll_flush_later(connection->poll, &connection->handler);
}

/* The same for requests that end one by one: many of them don't wait for the end of the pass. The
 * client sends its next requests while the rest is answered, and the disk doesn't run dry. */
static void nbd_reply_soon(struct nbd_request *request, uint32_t error)
{
    struct nbd_connection *connection = request->connection;

    nbd_reply(request, error);
    if (connection->unsent_parts >= NBD_EARLY_PARTS && !connection->blocked)
        nbd_send(connection);
}

/* Gathers what is unsent into `parts`. Returns how many. */
static int nbd_gather(const struct nbd_connection *connection, struct iovec *parts)
{
    uint64_t skip = connection->head_sent;
    int count = 0;

    for (const struct nbd_request *reply = connection->replies_first;
         reply != NULL && count + 2 <= NBD_PARTS_MAX; reply = reply->next) {
        if (skip < NBD_REPLY_BYTES) {
            parts[count].iov_base = (void *)(uintptr_t)(reply->reply + skip);
            parts[count++].iov_len = NBD_REPLY_BYTES - skip;
            skip = NBD_REPLY_BYTES;
        }
        if (reply->data_bytes != 0) {
            skip -= NBD_REPLY_BYTES;
            parts[count].iov_base = (void *)(uintptr_t)(reply->buffer->address + skip);
            parts[count++].iov_len = reply->data_bytes - skip;
        }
        skip = 0;
    }
    return count;
}

/* The kernel has taken `sent` bytes: replies that are through go. */
static void nbd_take_off(struct nbd_connection *connection, uint64_t sent)
{
    struct nbd_request *reply;

    connection->unsent_bytes -= sent;
    sent += connection->head_sent;
    while ((reply = connection->replies_first) != NULL &&
           sent >= NBD_REPLY_BYTES + (uint64_t)reply->data_bytes) {
        sent -= NBD_REPLY_BYTES + (uint64_t)reply->data_bytes;
        connection->unsent_parts -= 1 + (reply->data_bytes != 0);
        connection->replies_first = reply->next;
        nbd_request_release(reply);
    }
    connection->head_sent = (uint32_t)sent;
}

/* The peer is gone: Python hears of it, and will close. */
static void nbd_send_failed(struct nbd_connection *connection, int error)
{
    if (!connection->failed) {
        connection->failed = 1;
        poll_post(connection->poll, connection->token, NBD_SEND_FAILED, (uint64_t)error);
    }
    nbd_update_interest(connection);
}

/* Sends what the kernel takes. When that isn't all, epoll will say when it takes more. */
static void nbd_send(struct nbd_connection *connection)
{
    struct iovec parts[NBD_PARTS_MAX];
    int blocked = 0;

    if (connection->closed || connection->failed)
        return;
    while (connection->replies_first != NULL && !blocked) {
        struct msghdr message = {.msg_iov = parts};
        ssize_t sent;

        message.msg_iovlen = (size_t)nbd_gather(connection, parts);
        sent = sendmsg(connection->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent >= 0) {
            nbd_take_off(connection, (uint64_t)sent);
        } else if (errno == EAGAIN) {
            blocked = 1;
        } else if (errno != EINTR) {
            nbd_send_failed(connection, errno);
            return;
        }
    }
    if (blocked != connection->blocked) {
        connection->blocked = (uint8_t)blocked;
        nbd_update_interest(connection);
    }
    if (connection->paused && !nbd_backed_up(connection))
        nbd_unpause(connection);
    nbd_check_answered(connection);
}

/* Forgets what is unsent. */
static void nbd_drop_replies(struct nbd_connection *connection)
{
    struct nbd_request *reply;

    while ((reply = connection->replies_first) != NULL) {
        connection->replies_first = reply->next;
        nbd_request_release(reply);
    }
    connection->unsent_bytes = 0;
    connection->unsent_parts = 0;
    connection->head_sent = 0;
}

/* Tells Python, once each, that all is answered after nbd_stop, and that nothing is in flight after
 * nbd_close. */
static void nbd_check_answered(struct nbd_connection *connection)
{
    if (connection->in_flight != 0)
        return;
    if (connection->closed) {
        if (!connection->released) {
            connection->released = 1;
            poll_post(connection->poll, connection->token, NBD_RELEASED, 0);
        }
    } else if (connection->stopping && !connection->answered &&
               connection->replies_first == NULL) {
        connection->answered = 1;
        poll_post(connection->poll, connection->token, NBD_ANSWERED, 0);
    }
}
