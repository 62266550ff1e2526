/* SPDX-License-Identifier: Apache-2.0
 *
 * The native poll of poll.h: epoll, the handlers' lists, and the wait. poll_aio.c stands before this
 * in one translation unit.
 *
 * One pass serves everybody once, in this order: descriptors that are ready, handlers that a bound
 * stopped in the pass before, AIO, flushes. What a pass queues for itself belongs to the next, which
 * comes without a sleep; so none of them can keep the others waiting.
 *
 * No wake-up is lost. What is queued in this process is looked at after the last callback that could
 * queue something and before the sleep; what the kernel reports (descriptors, the eventfd of AIO,
 * the notifier that other threads set) ends a sleep even when it comes before it begins, because
 * epoll remembers levels and edges until they are fetched. */

#include <limits.h>
#include <string.h>
#include <time.h>

enum {
    POLL_NS_START = 4000,                /* adaptive polling begins with this, as QEMU's */
    POLL_SLOT_NS = 1000000,              /* of one half of a pass: see poll_is_late */
    POLL_RING_LOOKS = 16,                /* looks at the AIO ring per system call, spinning */
    POLL_IO_FACTOR = 10,                 /* longer, when work is known to come: poll_await */
    POLL_AIO_RETRY_NS = 1000000,         /* linux_aio.py's NO_ROOM_RETRY_NS */
    POLL_EVENTS_FIRST = 64,              /* room to begin with */
    POLL_BUFFERS_RETAINED_MAX = 64 << 20, /* buffers.py's RETAINED_BYTES_MAX */
};

#define POLL_SLEEP_NS_MAX (INT64_C(3600) * 1000000000) /* poller.py's TIMEOUT_NS_MAX */

static int64_t poll_clock(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* --- opening and closing --- */

int native_poll_open(struct native_poll **result)
{
    struct native_poll *poll = calloc(1, sizeof(struct poll_own));
    int error = -ENOMEM;

    *result = NULL;
    if (poll == NULL)
        return error;
    poll->epoll_fd = poll->aio_eventfd = -1;
    poll->ready = calloc(POLL_READY_MAX, sizeof *poll->ready);
    poll->events = calloc(POLL_EVENTS_FIRST, sizeof *poll->events);
    poll->event_capacity = POLL_EVENTS_FIRST;
    poll->buffers = buffer_pool_open(POLL_BUFFERS_RETAINED_MAX);
    if (poll->ready != NULL && poll->events != NULL && poll->buffers != NULL) {
        poll->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
        error = poll->epoll_fd < 0 ? -errno : 0;
    }
    if (error != 0) {
        native_poll_close(poll);
        return error;
    }
    *result = poll;
    return 0;
}

void native_poll_close(struct native_poll *poll)
{
    assert(poll->handlers == NULL);
    poll_aio_close(poll_own_of(poll));
    if (poll->epoll_fd >= 0)
        close(poll->epoll_fd);
    if (poll->buffers != NULL)
        buffer_pool_close(poll->buffers);
    free(poll->ready);
    free(poll->events);
    free(poll);
}

/* --- what epoll is asked for --- */

/* Changes what epoll watches of fd. Whoever closed the descriptor first has spared the kernel the
 * removal, and whoever opened another one under its number meanwhile gets it added. 0 or -errno. */
static int poll_control(const struct native_poll *poll, int32_t fd, uint32_t before,
                        uint32_t events, uint64_t data)
{
    struct epoll_event event = {.events = events, .data.u64 = data};

    if (events == before)
        return 0;
    if (events == 0) {
        if (epoll_ctl(poll->epoll_fd, EPOLL_CTL_DEL, fd, &event) == 0 || errno == EBADF ||
            errno == ENOENT)
            return 0;
        return -errno;
    }
    if (before != 0) {
        if (epoll_ctl(poll->epoll_fd, EPOLL_CTL_MOD, fd, &event) == 0)
            return 0;
        if (errno != ENOENT)
            return -errno;
    }
    return epoll_ctl(poll->epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0 ? 0 : -errno;
}

int native_poll_watch(struct native_poll *poll, int32_t fd, uint32_t before, uint32_t events)
{
    return poll_control(poll, fd, before, events, (uint64_t)(uint32_t)fd << 1 | 1);
}

/* Has epoll watch what a handler wants, or nothing while it is to be silent. Nothing is a removal:
 * epoll reports errors and hang-ups of what it watches, wanted or not. */
static void poll_apply(struct native_poll *poll, struct poll_handler *handler)
{
    uint32_t events = poll->external_disabled ? 0 : handler->interest;

    if (poll_control(poll, handler->fd, handler->watched, events, (uint64_t)(uintptr_t)handler) ==
            0 ||
        events == 0)
        handler->watched = events;
}

void poll_interest(struct native_poll *poll, struct poll_handler *handler, uint32_t interest)
{
    handler->interest = interest;
    poll_apply(poll, handler);
}

void native_poll_silence(struct native_poll *poll, int32_t silent)
{
    poll->external_disabled = silent != 0;
    for (struct poll_handler *handler = poll->handlers; handler != NULL; handler = handler->next)
        poll_apply(poll, handler);
}

/* --- handlers --- */

/* Whether epoll could watch fd. 0 or -errno. */
static int poll_probe(const struct native_poll *poll, int32_t fd)
{
    int error = poll_control(poll, fd, 0, EPOLLIN, 0);

    return error != 0 ? error : poll_control(poll, fd, EPOLLIN, 0, 0);
}

/* Room for all that may be posted: what is reserved, and what handlers that have gone left behind. */
static int poll_reserve(struct poll_own *own, uint32_t events)
{
    struct native_poll *poll = &own->poll;
    uint64_t capacity = own->events_reserved + poll->event_count + events;
    struct poll_event *grown;

    if (capacity > poll->event_capacity) {
        if (capacity > UINT32_MAX)
            return -ENOMEM;
        grown = realloc(poll->events, capacity * sizeof *grown);
        if (grown == NULL)
            return -ENOMEM;
        poll->events = grown;
        poll->event_capacity = (uint32_t)capacity;
    }
    own->events_reserved += events;
    return 0;
}

static void poll_unreserve(struct poll_own *own, uint32_t events)
{
    assert(own->events_reserved >= events);
    own->events_reserved -= events;
}

int native_poll_add_token(struct native_poll *poll)
{
    return poll_reserve(poll_own_of(poll), 1);
}

void native_poll_remove_token(struct native_poll *poll)
{
    poll_unreserve(poll_own_of(poll), 1);
}

int poll_add(struct native_poll *poll, struct poll_handler *handler, uint32_t events)
{
    int error = poll_probe(poll, handler->fd);

    if (error == 0)
        error = poll_reserve(poll_own_of(poll), events);
    if (error != 0)
        return error;
    handler->interest = handler->watched = 0;
    handler->is_again = handler->is_flush = 0;
    handler->next_again = handler->next_flush = NULL;
    handler->previous = NULL;
    handler->next = poll->handlers;
    if (handler->next != NULL)
        handler->next->previous = handler;
    poll->handlers = handler;
    poll->handler_count++;
    return 0;
}

/* Takes a handler out of the list of `again`. */
static void poll_forget_again(struct native_poll *poll, const struct poll_handler *handler)
{
    struct poll_handler **link = &poll->again_first;
    struct poll_handler *last = NULL;

    while (*link != NULL && *link != handler) {
        last = *link;
        link = &last->next_again;
    }
    if (*link == NULL)
        return;
    *link = handler->next_again;
    if (poll->again_last == handler)
        poll->again_last = last;
}

/* Takes a handler out of the list of flushes. */
static void poll_forget_flush(struct native_poll *poll, const struct poll_handler *handler)
{
    struct poll_handler **link = &poll->flush_first;
    struct poll_handler *last = NULL;

    while (*link != NULL && *link != handler) {
        last = *link;
        link = &last->next_flush;
    }
    if (*link == NULL)
        return;
    *link = handler->next_flush;
    if (poll->flush_last == handler)
        poll->flush_last = last;
}

void poll_remove(struct native_poll *poll, struct poll_handler *handler, uint32_t events)
{
    struct poll_own *own = poll_own_of(poll);

    poll_interest(poll, handler, 0);
    poll_forget_again(poll, handler);
    poll_forget_flush(poll, handler);
    for (int32_t i = own->batch_next; i < own->batch_count; i++)
        if (own->batch[i].data.u64 == (uint64_t)(uintptr_t)handler)
            own->batch[i].data.u64 = 0; /* fetched, and not to be told any more */
    if (handler->previous != NULL)
        handler->previous->next = handler->next;
    else
        poll->handlers = handler->next;
    if (handler->next != NULL)
        handler->next->previous = handler->previous;
    poll->handler_count--;
    poll_unreserve(own, events);
}

void poll_again(struct native_poll *poll, struct poll_handler *handler)
{
    if (handler->is_again)
        return;
    handler->is_again = 1;
    handler->next_again = NULL;
    if (poll->again_first == NULL)
        poll->again_first = handler;
    else
        poll->again_last->next_again = handler;
    poll->again_last = handler;
}

int poll_is_late(struct native_poll *poll)
{
    return poll->slot_turns++ > 0 && poll_clock() - poll->slot_ns > POLL_SLOT_NS;
}

void poll_flush_later(struct native_poll *poll, struct poll_handler *handler)
{
    if (handler->is_flush)
        return;
    handler->is_flush = 1;
    handler->next_flush = NULL;
    if (poll->flush_first == NULL)
        poll->flush_first = handler;
    else
        poll->flush_last->next_flush = handler;
    poll->flush_last = handler;
}

void poll_post(struct native_poll *poll, uint64_t token, uint64_t what, uint64_t value)
{
    struct poll_event event = {.token = token, .what = what, .value = value};

    assert(poll->event_count < poll->event_capacity);
    poll->events[poll->event_count++] = event;
}

/* --- a pass --- */

/* Calls the handlers of what epoll has reported, and notes Python's descriptors. */
static void poll_serve_batch(struct poll_own *own, int count)
{
    struct native_poll *poll = &own->poll;

    own->batch_next = 0;
    own->batch_count = count;
    while (own->batch_next < own->batch_count) {
        struct epoll_event event = own->batch[own->batch_next++];
        struct poll_handler *handler = (struct poll_handler *)(uintptr_t)event.data.u64;

        if (event.data.u64 & 1) {
            poll->ready[poll->ready_count].fd = (int32_t)(event.data.u64 >> 1);
            poll->ready[poll->ready_count++].events = event.events;
        } else if (handler != NULL && handler->watched != 0) {
            handler->ready(poll, handler, event.events);
        }
    }
    own->batch_next = own->batch_count = 0;
}

static void poll_begin_slot(struct native_poll *poll, int64_t now_ns)
{
    poll->slot_ns = now_ns;
    poll->slot_turns = 0;
}

/* Whether a half of a pass has had its time, and somebody a turn in it. */
static int poll_is_over(const struct native_poll *poll)
{
    return poll->slot_turns > 0 && poll_clock() - poll->slot_ns > POLL_SLOT_NS;
}

static uint32_t poll_count_again(const struct native_poll *poll)
{
    const struct poll_handler *handler = poll->again_first;
    uint32_t count = 0;

    for (; handler != NULL; handler = handler->next_again)
        count++;
    return count;
}

/* Calls go_on of `left` handlers, from the front: those that were queued before the pass; or of as
 * many as there is time for, so that who has become ready since needn't wait for all of them.
 * Callbacks may take any of them out meanwhile. */
static void poll_serve_again(struct native_poll *poll, uint32_t left)
{
    struct poll_handler *handler;

    poll_begin_slot(poll, left > 1 ? poll_clock() : poll->now_ns);
    while (left-- > 0 && (handler = poll->again_first) != NULL && !poll_is_over(poll)) {
        poll->again_first = handler->next_again;
        handler->is_again = 0;
        handler->go_on(poll, handler);
    }
}

/* Calls flush of those that are queued now. */
static void poll_serve_flushes(struct native_poll *poll)
{
    struct poll_handler *handler = poll->flush_first;
    uint32_t left = 0;

    for (; handler != NULL; handler = handler->next_flush)
        left++;
    while (left-- > 0 && (handler = poll->flush_first) != NULL) {
        poll->flush_first = handler->next_flush;
        handler->is_flush = 0;
        handler->flush(poll, handler);
    }
}

/* Serves everybody once; `count` entries of the batch are filled. */
static void poll_pass(struct poll_own *own, int count)
{
    struct native_poll *poll = &own->poll;
    uint32_t again = poll_count_again(poll);

    poll->now_ns = poll_clock();
    poll_begin_slot(poll, poll->now_ns);
    poll->passes++;
    poll_serve_batch(own, count);
    if (!poll->external_disabled)
        poll_serve_again(poll, again);
    if (poll->aio != NULL)
        poll_aio_serve(own);
    poll_serve_flushes(poll);
    if (poll_aio_is_staged(poll))
        poll_aio_push(own); /* Python may come next, and the disk shouldn't wait for it */
}

/* --- the wait --- */

/* Whether a pass would have something to do whatever the kernel says. */
static int poll_has_work(const struct native_poll *poll)
{
    return poll->event_count > 0 || poll->flush_first != NULL ||
           (poll->again_first != NULL && !poll->external_disabled) || poll_aio_is_staged(poll) ||
           poll_aio_is_finished(poll);
}

int native_poll_has_work(const struct native_poll *poll)
{
    return poll_has_work(poll) || poll_aio_is_stuck(poll);
}

/* Fetches events, and sleeps for them for at most left_ns. The count, or -errno. */
static int poll_fetch(struct poll_own *own, int64_t left_ns)
{
    int timeout_ms = 0;
    int count;

    if (left_ns > 0) {
        if (left_ns > POLL_SLEEP_NS_MAX)
            left_ns = POLL_SLEEP_NS_MAX;
        timeout_ms = (int)((left_ns + 999999) / 1000000);
        own->poll.sleeps++;
    }
    count = epoll_wait(own->poll.epoll_fd, own->batch, POLL_READY_MAX, timeout_ms);
    return count < 0 ? -errno : count;
}

/* Looks for work until until_ns without a sleep. 1 when there is some, with *count as poll_fetch
 * returns it; or 0. */
static int poll_spin(struct poll_own *own, int64_t until_ns, int *count)
{
    do {
        for (int i = 0; i < POLL_RING_LOOKS; i++) {
            if (poll_aio_is_finished(&own->poll)) {
                *count = 0;
                own->poll.spins_hit++;
                return 1;
            }
        }
        *count = poll_fetch(own, 0);
        if (*count != 0) {
            own->poll.spins_hit++;
            return 1;
        }
    } while (poll_clock() < until_ns);
    own->poll.spins_missed++;
    return 0;
}

/* Work came after blocked_ns, spinning for poll_ns of them: how long to spin the next time, which is
 * at most max_ns. QEMU's rules. */
static int64_t poll_adapt(const struct native_poll *poll, int64_t poll_ns, int64_t max_ns,
                          int64_t blocked_ns)
{
    int64_t grow = poll->poll_grow > 0 ? poll->poll_grow : 2;

    if (blocked_ns <= poll_ns)
        return poll_ns;
    if (blocked_ns > max_ns)
        return poll->poll_shrink > 0 ? poll_ns / poll->poll_shrink : 0;
    if (poll_ns == 0)
        return POLL_NS_START < max_ns ? POLL_NS_START : max_ns;
    return poll_ns < max_ns / grow ? poll_ns * grow : max_ns;
}

/* How long a sleep that begins at now_ns may last. */
static int64_t poll_left(const struct native_poll *poll, int64_t now_ns, int64_t deadline_ns)
{
    int64_t left_ns = deadline_ns - now_ns;

    return poll_aio_is_stuck(poll) && left_ns > POLL_AIO_RETRY_NS ? POLL_AIO_RETRY_NS : left_ns;
}

/* Waits for something to do a pass for, until the deadline at most. The count of events fetched,
 * which may be 0, or -errno.
 *
 * While the disk works for us, work is sure to come, and soon. A sleep then also lets the processor
 * fall asleep that the disk interrupts, and what it finishes meanwhile comes in one heap, for which
 * the disk has nothing to do. So that is looked for longer, and adapts by itself. */
static int poll_await(struct poll_own *own, int64_t deadline_ns)
{
    struct native_poll *poll = &own->poll;
    int is_io = poll->aio != NULL && poll->aio->in_kernel > 0;
    int64_t *poll_ns = is_io ? &poll->poll_io_ns : &poll->poll_ns;
    int64_t max_ns = is_io ? POLL_IO_FACTOR * poll->poll_max_ns : poll->poll_max_ns;
    int64_t start_ns, left_ns;
    int count;

    if (poll_has_work(poll))
        return poll_fetch(own, 0);
    start_ns = poll_clock();
    left_ns = poll_left(poll, start_ns, deadline_ns);
    if (left_ns <= 0)
        return poll_fetch(own, 0);
    if (*poll_ns == 0) {
        count = poll_fetch(own, left_ns);
    } else {
        int64_t spin_ns = *poll_ns < left_ns ? *poll_ns : left_ns;

        if (!poll_spin(own, start_ns + spin_ns, &count))
            count = poll_fetch(own, poll_left(poll, poll_clock(), deadline_ns));
    }
    if (poll->poll_max_ns > 0 && count >= 0)
        *poll_ns = poll_adapt(poll, *poll_ns, max_ns, poll_clock() - start_ns);
    return count;
}

int native_poll_wait(struct native_poll *poll, int64_t timeout_ns)
{
    struct poll_own *own = poll_own_of(poll);
    int64_t deadline_ns = INT64_MAX;
    int count;

    poll->ready_count = 0;
    if (timeout_ns > 0) {
        int64_t now_ns = poll_clock();

        if (timeout_ns < INT64_MAX - now_ns)
            deadline_ns = now_ns + timeout_ns;
    }
    do {
        count = timeout_ns == 0 ? poll_fetch(own, 0) : poll_await(own, deadline_ns);
        if (count < 0)
            return count;
        poll_pass(own, count);
    } while (poll->ready_count == 0 && poll->event_count == 0 && timeout_ns != 0 &&
             poll->now_ns < deadline_ns);
    return (int)(poll->ready_count + poll->event_count);
}
