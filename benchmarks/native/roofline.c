/* SPDX-License-Identifier: Apache-2.0
 *
 * The roofline: what a server of this protocol can't do without, and nothing else.
 *
 * One thread, one epoll, one unix socket, one raw file. Per batch it does one recv, then per
 * request one pread or pwrite, then one send: no graph, no map, no permissions, no limits, no
 * drains, no export names, no orderly end. What a real daemon reaches of this is what its
 * structure costs; what nbdkit or qemu reach of it is what theirs does.
 *
 * It is for benchmarks only: it trusts its client, and ends when the client breaks the protocol.
 * It speaks fixed newstyle with NBD_OPT_GO and NBD_OPT_EXPORT_NAME, simple replies, and READ,
 * WRITE, FLUSH and DISC; other options are unsupported, other commands EINVAL.
 *
 * Usage: roofline FILE SOCKET. Prints "ready" when clients can connect.
 */

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define OPTION_MAGIC 0x49484156454F5054ULL /* "IHAVEOPT" */
#define OPTION_REPLY_MAGIC 0x3E889045565A9ULL
#define REQUEST_MAGIC 0x25609513U
#define REPLY_MAGIC 0x67446698U

enum { OPT_EXPORT_NAME = 1, OPT_ABORT = 2, OPT_GO = 7 };
enum { REP_ACK = 1, REP_INFO = 3 };
#define REP_ERR_UNSUP 0x80000001U
enum { CMD_READ = 0, CMD_WRITE = 1, CMD_DISC = 2, CMD_FLUSH = 3 };

#define FLAGS_HANDSHAKE 3    /* fixed newstyle, no zeroes */
#define FLAGS_EXPORT 0x05    /* has flags, flush */
#define REQUEST_BYTES 28
#define REPLY_BYTES 16
#define LENGTH_MAX (2U << 20)          /* of one request */
#define INPUT_BYTES (LENGTH_MAX + 4096)
#define OUTPUT_BYTES (LENGTH_MAX + 4096) /* of one batch; a larger one is sent in parts */
#define RECEIVES_MAX 16                /* per connection and round */

struct connection {
    int fd;
    size_t filled;
    char *input;
};

static int disk;
static uint64_t disk_bytes;
static char output[OUTPUT_BYTES] __attribute__((aligned(4096)));
static size_t output_filled;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void put16(char *at, uint16_t value) { value = htobe16(value); memcpy(at, &value, 2); }
static void put32(char *at, uint32_t value) { value = htobe32(value); memcpy(at, &value, 4); }
static void put64(char *at, uint64_t value) { value = htobe64(value); memcpy(at, &value, 8); }
static uint32_t get32(const char *at) { uint32_t value; memcpy(&value, at, 4); return be32toh(value); }
static uint64_t get64(const char *at) { uint64_t value; memcpy(&value, at, 8); return be64toh(value); }

static int send_all(int fd, const char *data, size_t length)
{
    while (length > 0) {
        ssize_t sent = send(fd, data, length, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            return -1;
        }
        data += sent;
        length -= (size_t)sent;
    }
    return 0;
}

static int receive_all(int fd, char *data, size_t length)
{
    while (length > 0) {
        ssize_t got = recv(fd, data, length, MSG_WAITALL);
        if (got <= 0)
            return -1;
        data += got;
        length -= (size_t)got;
    }
    return 0;
}

static int option_reply(int fd, uint32_t option, uint32_t kind, const char *data, uint32_t length)
{
    char reply[20 + 12];
    put64(reply, OPTION_REPLY_MAGIC);
    put32(reply + 8, option);
    put32(reply + 12, kind);
    put32(reply + 16, length);
    memcpy(reply + 20, data, length);
    return send_all(fd, reply, 20 + length);
}

/* Blocking: nobody measures it. 0 when the client may send requests, -1 when it has left. */
static int negotiate(int fd)
{
    char data[4096];
    memcpy(data, "NBDMAGICIHAVEOPT", 16);
    put16(data + 16, FLAGS_HANDSHAKE);
    if (send_all(fd, data, 18) || receive_all(fd, data, 4))
        return -1;
    int no_zeroes = get32(data) & 2;
    for (;;) {
        if (receive_all(fd, data, 16) || get64(data) != OPTION_MAGIC)
            return -1;
        uint32_t option = get32(data + 8), length = get32(data + 12);
        if (length > sizeof data || receive_all(fd, data, length))
            return -1;
        if (option == OPT_EXPORT_NAME) {
            memset(data, 0, 134);
            put64(data, disk_bytes);
            put16(data + 8, FLAGS_EXPORT);
            return send_all(fd, data, no_zeroes ? 10 : 134);
        }
        if (option == OPT_GO) {
            char info[12];
            put16(info, 0);
            put64(info + 2, disk_bytes);
            put16(info + 10, FLAGS_EXPORT);
            return option_reply(fd, option, REP_INFO, info, 12) ||
                           option_reply(fd, option, REP_ACK, "", 0) ? -1 : 0;
        }
        if (option_reply(fd, option, option == OPT_ABORT ? REP_ACK : REP_ERR_UNSUP, "", 0) ||
            option == OPT_ABORT)
            return -1;
    }
}

static int flush_output(int fd)
{
    int failed = send_all(fd, output, output_filled);
    output_filled = 0;
    return failed;
}

/* One request whose payload, if any, has come; its reply goes to the end of the output. */
static int answer(int fd, const char *request, uint16_t type, uint64_t offset, uint32_t length)
{
    uint32_t error = 0;
    size_t payload = type == CMD_READ ? length : 0;
    if (output_filled + REPLY_BYTES + payload > OUTPUT_BYTES && flush_output(fd))
        return -1;
    char *reply = output + output_filled;
    if (type == CMD_READ)
        error = pread(disk, reply + REPLY_BYTES, length, (off_t)offset) != (ssize_t)length;
    else if (type == CMD_WRITE)
        error = pwrite(disk, request + REQUEST_BYTES, length, (off_t)offset) != (ssize_t)length;
    else if (type == CMD_FLUSH)
        error = fdatasync(disk) != 0;
    else
        error = EINVAL;
    put32(reply, REPLY_MAGIC);
    put32(reply + 4, error == 1 ? EIO : error);
    memcpy(reply + 8, request + 8, 8); /* the cookie, as it came */
    output_filled += REPLY_BYTES + (error ? 0 : payload);
    return 0;
}

/* Answers all whole requests in the input and keeps the rest; -1 when the client is to go. */
static int answer_batch(struct connection *client)
{
    size_t at = 0;
    while (client->filled - at >= REQUEST_BYTES) {
        const char *request = client->input + at;
        uint16_t type = (uint16_t)get32(request + 4); /* the upper half is flags */
        uint32_t length = get32(request + 24);
        if (get32(request) != REQUEST_MAGIC || length > LENGTH_MAX || type == CMD_DISC)
            return -1;
        size_t whole = REQUEST_BYTES + (type == CMD_WRITE ? (size_t)length : 0);
        if (client->filled - at < whole)
            break;
        if (answer(client->fd, request, type, get64(request + 16), length))
            return -1;
        at += whole;
    }
    client->filled -= at;
    if (at > 0 && client->filled > 0)
        memmove(client->input, client->input + at, client->filled);
    return output_filled > 0 ? flush_output(client->fd) : 0;
}

/* What there is to receive, within a bound; -1 when the connection is over. */
static int serve(struct connection *client)
{
    for (int turn = 0; turn < RECEIVES_MAX; turn++) {
        ssize_t got = recv(client->fd, client->input + client->filled,
                           INPUT_BYTES - client->filled, MSG_DONTWAIT);
        if (got < 0 && (errno == EAGAIN || errno == EINTR))
            return 0;
        if (got <= 0)
            return -1;
        client->filled += (size_t)got;
        if (answer_batch(client))
            return -1;
    }
    return 0;
}

static void welcome(int poller, int listener)
{
    int fd = accept(listener, NULL, NULL);
    if (fd < 0)
        return;
    struct connection *client = calloc(1, sizeof *client);
    if (client == NULL || (client->input = malloc(INPUT_BYTES)) == NULL)
        die("malloc");
    client->fd = fd;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = client};
    if (negotiate(fd) || epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event)) {
        close(fd);
        free(client->input);
        free(client);
    }
}

int main(int count, char **words)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct stat status;
    if (count != 3 || strlen(words[2]) >= sizeof address.sun_path) {
        fputs("usage: roofline FILE SOCKET\n", stderr);
        return 2;
    }
    disk = open(words[1], O_RDWR | O_CLOEXEC);
    if (disk < 0 || fstat(disk, &status))
        die(words[1]);
    disk_bytes = (uint64_t)status.st_size;
    strcpy(address.sun_path, words[2]);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) ||
        listen(listener, 16))
        die(words[2]);
    int poller = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event))
        die("epoll");
    puts("ready");
    fflush(stdout);
    for (;;) {
        struct epoll_event events[16];
        int ready = epoll_wait(poller, events, 16, -1);
        for (int index = 0; index < ready; index++) {
            struct connection *client = events[index].data.ptr;
            if (client == NULL) {
                welcome(poller, listener);
            } else if (serve(client)) {
                close(client->fd);
                free(client->input);
                free(client);
            }
        }
    }
}
