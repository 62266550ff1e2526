/* SPDX-License-Identifier: Apache-2.0
 *
 * Replies on their way out: in the order in which requests end, many in one sendmsg, partly when the
 * socket is full. A request and its buffer live until the kernel has taken the last byte. */

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

static uint64_t nbd_reply_bytes(const struct nbd_request *reply)
{
    return reply->answer != NULL ? reply->answer->bytes : reply->head_bytes + reply->data_bytes;
}

static uint32_t nbd_reply_parts(const struct nbd_request *reply)
{
    return reply->answer != NULL ? reply->answer->count : 1 + (reply->data_bytes != 0);
}

static struct iovec nbd_reply_part(const struct nbd_request *reply, uint32_t index)
{
    struct iovec part;

    if (reply->answer != NULL)
        return reply->answer->parts[index];
    if (index == 0) {
        part.iov_base = (void *)(uintptr_t)reply->head;
        part.iov_len = reply->head_bytes;
    } else {
        part.iov_base = (void *)(uintptr_t)reply->buffer->address;
        part.iov_len = reply->data_bytes;
    }
    return part;
}

/* The request is over: its reply joins the queue. It is the `answer`, if that is there, or says that
 * all went well. */
static void nbd_reply(struct nbd_request *request)
{
    struct nbd_connection *connection = request->connection;

    connection->in_flight--;
    connection->in_flight_bytes -= nbd_bytes_held(request);
    if (request->answer == NULL) {
        request->data_bytes = request->command == NBD_READ ? request->length : 0;
        request->head_bytes = nbd_write_head(request);
    }
    request->next = NULL;
    if (connection->replies_first == NULL)
        connection->replies_first = request;
    else
        connection->replies_last->next = request;
    connection->replies_last = request;
    connection->unsent_bytes += nbd_reply_bytes(request);
    connection->unsent_parts += nbd_reply_parts(request);
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
static void nbd_reply_soon(struct nbd_request *request)
{
    struct nbd_connection *connection = request->connection;

    nbd_reply(request);
    if (connection->unsent_parts >= NBD_EARLY_PARTS && !connection->blocked)
        nbd_send(connection);
}

/* Gathers what is unsent into `parts`, as far as they go. Returns how many. */
static int nbd_gather(const struct nbd_connection *connection, struct iovec *parts)
{
    uint64_t skip = connection->head_sent;
    int count = 0;

    for (const struct nbd_request *reply = connection->replies_first; reply != NULL;
         reply = reply->next)
        for (uint32_t i = 0, last = nbd_reply_parts(reply); i < last; i++) {
            struct iovec part = nbd_reply_part(reply, i);

            if (skip >= part.iov_len) {
                skip -= part.iov_len;
                continue;
            }
            if (count == NBD_PARTS_MAX)
                return count;
            parts[count].iov_base = (uint8_t *)part.iov_base + skip;
            parts[count++].iov_len = part.iov_len - skip;
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
    while ((reply = connection->replies_first) != NULL && sent >= nbd_reply_bytes(reply)) {
        sent -= nbd_reply_bytes(reply);
        connection->unsent_parts -= nbd_reply_parts(reply);
        connection->replies_first = reply->next;
        nbd_request_release(reply);
    }
    connection->head_sent = sent;
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
