/* SPDX-License-Identifier: Apache-2.0
 *
 * Linux AIO inside the native poll: slots and batches over aio_queue.c, in whose translation unit
 * this stands. linux_aio.py is its Python twin and gives the reasons for its numbers.
 *
 * Results are kept where nothing overwrites them. A submit reaps at once, also when a full batch
 * leaves from within poll_io_start, where no `done` may run: what it found becomes the queue's
 * "refused" entries, which the next reap reports first. And a `done` may start I/O whose submit
 * fills the queue's arrays anew: so they are swapped for spare ones before it is called. */

#undef NDEBUG /* distutils sets it; what must hold is asserted all the same */

#include <assert.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum {
    POLL_READY_MAX = 256, /* descriptors per epoll_wait: poller.py's EVENTS_MAX */
    POLL_AIO_BATCH = 8,   /* linux_aio.py's AIO_MAX_BATCH */
};

/* A poll with what its users don't see. All code that works on one poll is compiled from the same
 * files, maybe into several modules, so they agree on this. */
struct poll_own {
    struct native_poll poll; /* first */
    uint64_t events_reserved; /* by handlers, in `poll.events` */
    int64_t *aio_slots;       /* [depth], spare for aio->finished_slots */
    int64_t *aio_results;     /* [depth] */
    int32_t aio_no_room;      /* the kernel refused what is staged with EAGAIN */
    int32_t batch_next;       /* of the pass under way: events not looked at are [next, count) */
    int32_t batch_count;
    struct epoll_event batch[POLL_READY_MAX];
};

static struct poll_own *poll_own_of(struct native_poll *poll)
{
    return (struct poll_own *)poll;
}

static void poll_swap(int64_t **one, int64_t **other)
{
    int64_t *kept = *one;

    *one = *other;
    *other = kept;
}

/* Gives back what native_poll_open_aio has made of it. */
static void poll_aio_close(struct poll_own *own)
{
    struct native_poll *poll = &own->poll;

    if (poll->aio != NULL)
        aio_queue_close(poll->aio);
    if (poll->aio_eventfd >= 0)
        close(poll->aio_eventfd);
    free(poll->aio_free);
    free(poll->aio_slots);
    free(own->aio_slots);
    free(own->aio_results);
    poll->aio = NULL;
    poll->aio_eventfd = -1;
    poll->aio_free = NULL;
    poll->aio_slots = NULL;
    own->aio_slots = NULL;
    own->aio_results = NULL;
}

/* poll.h. The eventfd is edge-triggered, so that it needn't be read: each completion is an edge. */
int native_poll_open_aio(struct native_poll *poll, uint32_t depth)
{
    struct poll_own *own = poll_own_of(poll);
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u64 = 0};
    int error = 0;

    assert(poll->aio == NULL && depth > 0);
    poll->aio_free = calloc(depth, sizeof *poll->aio_free);
    poll->aio_slots = calloc(depth, sizeof *poll->aio_slots);
    own->aio_slots = calloc(depth, sizeof *own->aio_slots);
    own->aio_results = calloc(depth, sizeof *own->aio_results);
    if (!poll->aio_free || !poll->aio_slots || !own->aio_slots || !own->aio_results)
        error = -ENOMEM;
    if (error == 0) {
        poll->aio_eventfd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        if (poll->aio_eventfd < 0)
            error = -errno;
    }
    if (error == 0)
        error = aio_queue_open(&poll->aio, depth, poll->aio_eventfd, 1);
    if (error == 0 && epoll_ctl(poll->epoll_fd, EPOLL_CTL_ADD, poll->aio_eventfd, &event) != 0)
        error = -errno;
    if (error != 0) {
        poll_aio_close(own);
        return error;
    }
    for (uint32_t i = 0; i < depth; i++)
        poll->aio_free[i] = depth - 1 - i;
    poll->aio_free_count = depth;
    return 0;
}

/* Whether a reap would find something, without asking the kernel. */
static int poll_aio_is_finished(const struct native_poll *poll)
{
    const struct aio_queue *queue = poll->aio;

    if (queue == NULL)
        return 0;
    if (queue->refused_count > 0)
        return 1;
    if (queue->in_kernel > 0 && queue->reads_ring) {
        const struct ring_header *ring = queue->context;

        return ring->head != __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE);
    }
    return 0;
}

/* Whether there is something to submit that the kernel hasn't refused yet. */
static int poll_aio_is_staged(const struct native_poll *poll)
{
    return poll->aio != NULL && poll->aio->staged_count > 0 &&
           !((const struct poll_own *)poll)->aio_no_room;
}

/* Whether only time will tell: the kernel has no room, and no completion of ours will make some. */
static int poll_aio_is_stuck(const struct native_poll *poll)
{
    return poll->aio != NULL && poll->aio->staged_count > 0 && poll->aio->in_kernel == 0;
}

/* Hands over what is staged. Returns how many entries of finished_slots and finished_results it
 * has filled; the caller sees to them before anything else is submitted or reaped. */
static uint32_t poll_aio_submit(struct poll_own *own)
{
    struct aio_queue *queue = own->poll.aio;
    int count = aio_queue_submit(queue);

    assert(count >= 0);
    own->aio_no_room = queue->staged_count > 0;
    return (uint32_t)count;
}

/* Hands over what is staged, and keeps what has finished for the next reap. */
static void poll_aio_push(struct poll_own *own)
{
    struct aio_queue *queue = own->poll.aio;
    uint32_t count = poll_aio_submit(own);

    assert(queue->refused_count == 0); /* they have been reported */
    poll_swap(&queue->finished_slots, &queue->refused_slots);
    poll_swap(&queue->finished_results, &queue->refused_results);
    queue->refused_count = count;
}

/* Gives a request a free slot and stages it; a full batch leaves at once. */
static void poll_aio_stage(struct poll_own *own, struct poll_io *io)
{
    struct native_poll *poll = &own->poll;
    struct aio_queue *queue = poll->aio;
    uint32_t slot = poll->aio_free[--poll->aio_free_count];
    struct aio_request *request = &queue->staged[queue->staged_count++];

    poll->aio_slots[slot] = io;
    request->address = io->address;
    request->length = io->length;
    request->offset = io->offset;
    request->fd = io->fd;
    request->rw_flags = io->rw_flags;
    request->opcode = io->opcode;
    request->slot = slot;
    if (queue->staged_count >= POLL_AIO_BATCH && !own->aio_no_room)
        poll_aio_push(own);
}

void poll_io_start(struct native_poll *poll, struct poll_io *io)
{
    assert(poll->aio != NULL);
    io->next = NULL;
    if (poll->aio_free_count > 0 && poll->aio_waiting_first == NULL) {
        poll_aio_stage(poll_own_of(poll), io);
    } else {
        if (poll->aio_waiting_first == NULL)
            poll->aio_waiting_first = io;
        else
            poll->aio_waiting_last->next = io;
        poll->aio_waiting_last = io;
    }
}

/* Requests that waited for a slot take those that are free now. */
static void poll_aio_admit(struct poll_own *own)
{
    struct native_poll *poll = &own->poll;
    struct poll_io *io;

    while (poll->aio_free_count > 0 && (io = poll->aio_waiting_first) != NULL) {
        poll->aio_waiting_first = io->next;
        io->next = NULL;
        poll_aio_stage(own, io);
    }
}

/* Submits what is staged, and calls `done` of what has finished. */
static void poll_aio_serve(struct poll_own *own)
{
    struct native_poll *poll = &own->poll;
    struct aio_queue *queue = poll->aio;
    uint32_t count;

    if (queue->staged_count > 0)
        count = poll_aio_submit(own);
    else if (queue->in_kernel > 0 || queue->refused_count > 0)
        count = (uint32_t)aio_queue_reap(queue);
    else
        return;
    poll_swap(&queue->finished_slots, &own->aio_slots);
    poll_swap(&queue->finished_results, &own->aio_results);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t slot = (uint32_t)own->aio_slots[i];
        struct poll_io *io = poll->aio_slots[slot];

        poll->aio_slots[slot] = NULL;
        poll->aio_free[poll->aio_free_count++] = slot;
        io->done(poll, io, own->aio_results[i]);
    }
    poll_aio_admit(own);
}
