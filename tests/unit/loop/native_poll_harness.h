/* SPDX-License-Identifier: Apache-2.0
 *
 * What the native poll's harnesses share: the code under test, over the machine's epoll and AIO, whose
 * io_submit also answers what a test tells it to, and a handler that writes a diary. */

#include <stdint.h>
#include <stdio.h>

#include "aio_queue.h"
#include "buffer_pool.h"
#include "poll.h"
#include "aio_queue.c"
#include "buffer_pool.c"
#include "poll_aio.c"
#include "poll.c"

#define CHECK(condition)                                   \
    do {                                                   \
        if (!(condition)) {                                \
            printf("line %d: %s\n", __LINE__, #condition); \
            exit(1);                                       \
        }                                                  \
    } while (0)

/* --- libaio, as it is but for what is scripted --- */

static int submit_answers[8]; /* what io_submit returns, call by call; 0 ends them: the kernel's */
static int submit_answered, submit_calls;

int io_setup(int depth, io_context_t *context)
{
    return syscall(SYS_io_setup, depth, context) == 0 ? 0 : -errno;
}

int io_destroy(io_context_t context)
{
    return syscall(SYS_io_destroy, context) == 0 ? 0 : -errno;
}

int io_submit(io_context_t context, long count, struct iocb *pointers[])
{
    long taken;

    submit_calls++;
    if (submit_answers[submit_answered] != 0)
        return submit_answers[submit_answered++];
    taken = syscall(SYS_io_submit, context, count, pointers);
    return taken < 0 ? -errno : (int)taken;
}

int io_getevents(io_context_t context, long min, long max, struct io_event *events,
                 struct timespec *timeout)
{
    long found = syscall(SYS_io_getevents, context, min, max, events, timeout);

    return found < 0 ? -errno : (int)found;
}

__attribute__((unused)) static void script(int first, int second)
{
    memset(submit_answers, 0, sizeof submit_answers);
    submit_answers[0] = first;
    submit_answers[1] = second;
    submit_answered = submit_calls = 0;
}

/* --- a handler that writes a diary --- */

struct actor {
    struct poll_handler handler;
    struct actor *victim; /* taken out in ready */
    int end;              /* of the pipe or eventfd to read from */
    int reads;            /* whether ready takes what is there */
    int again;            /* go_on: how often to ask for more */
    int flush_again;
    int posts; /* in ready: an event */
    char name;
};

static char diary[64];
static int diary_length;

static void note(char what, char name)
{
    CHECK(diary_length + 3 < (int)sizeof diary);
    diary[diary_length++] = what;
    diary[diary_length++] = name;
    diary[diary_length] = 0;
}

__attribute__((unused)) static int diary_is(const char *text)
{
    int same = strcmp(diary, text) == 0;

    if (!same)
        printf("diary: %s\n", diary);
    diary_length = 0;
    diary[0] = 0;
    return same;
}

static void actor_ready(struct native_poll *poll, struct poll_handler *handler, uint32_t events)
{
    struct actor *actor = (struct actor *)handler;
    uint64_t value;

    note(events & EPOLLHUP ? 'h' : 'r', actor->name);
    if (actor->reads)
        CHECK(read(actor->end, &value, sizeof value) > 0);
    if (actor->posts)
        poll_post(poll, (uint64_t)actor->name, 1, 2);
    if (actor->victim != NULL) {
        poll_remove(poll, &actor->victim->handler, 4);
        free(actor->victim);
        actor->victim = NULL;
    }
}

static void actor_go_on(struct native_poll *poll, struct poll_handler *handler)
{
    struct actor *actor = (struct actor *)handler;

    note('g', actor->name);
    if (actor->again-- > 0)
        poll_again(poll, handler);
}

static void actor_flush(struct native_poll *poll, struct poll_handler *handler)
{
    struct actor *actor = (struct actor *)handler;

    note('f', actor->name);
    if (actor->flush_again-- > 0)
        poll_flush_later(poll, handler);
}

__attribute__((unused)) static struct actor *actor_new(struct native_poll *poll, char name, int fd)
{
    struct actor *actor = calloc(1, sizeof *actor);

    CHECK(actor != NULL);
    actor->handler.ready = actor_ready;
    actor->handler.go_on = actor_go_on;
    actor->handler.flush = actor_flush;
    actor->handler.fd = actor->end = fd;
    actor->name = name;
    CHECK(poll_add(poll, &actor->handler, 4) == 0);
    return actor;
}

static void actor_drop(struct native_poll *poll, struct actor *actor)
{
    poll_remove(poll, &actor->handler, 4);
    free(actor);
}

static struct native_poll *poll_new(void)
{
    struct native_poll *poll;

    CHECK(native_poll_open(&poll) == 0);
    return poll;
}

static int eventfd_new(unsigned value)
{
    int fd = eventfd(value, EFD_NONBLOCK | EFD_CLOEXEC);

    CHECK(fd >= 0);
    return fd;
}
