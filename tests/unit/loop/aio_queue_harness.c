/* SPDX-License-Identifier: Apache-2.0
 *
 * native/aio_queue.c over a libaio that does what a test tells it to. Built and run under the
 * address and undefined-behaviour sanitizers by test_aio_queue.py; each check prints its line. */

#include <stdint.h>
#include <stdio.h>

#include "aio_queue.h"
#include "aio_queue.c"

enum { RING_ENTRIES = 5 };

static struct {
    struct ring_header header;
    struct io_event events[RING_ENTRIES];
} ring;
static int submit_answers[8]; /* what io_submit returns, call by call; 0 ends them: it takes all */
static int submit_calls, getevents_calls;
static uint64_t taken[64];
static int taken_count;

int io_setup(int depth, io_context_t *context)
{
    (void)depth;
    *context = (io_context_t)&ring;
    return 0;
}

int io_destroy(io_context_t context) { return context == (io_context_t)&ring ? 0 : -EINVAL; }

int io_submit(io_context_t context, long count, struct iocb *pointers[])
{
    int answer = submit_answers[submit_calls];
    int i;

    (void)context;
    if (answer != 0)
        submit_calls++;
    else
        answer = (int)count;
    for (i = 0; i < answer; i++)
        taken[taken_count++] = (uint64_t)(uintptr_t)pointers[i]->data;
    return answer;
}

int io_getevents(io_context_t context, long min, long max, struct io_event *events,
                 struct timespec *timeout)
{
    (void)context, (void)min, (void)max, (void)timeout;
    if (getevents_calls++ > 0)
        return 0;
    events[0].data = (void *)1;
    events[0].res = (unsigned long)-EIO;
    return 1;
}

#define CHECK(condition)                                          \
    do {                                                          \
        if (!(condition)) {                                       \
            printf("line %d: %s\n", __LINE__, #condition);        \
            return 1;                                             \
        }                                                         \
    } while (0)

static void complete(uint32_t slot, long result)
{
    ring.events[ring.header.tail].data = (void *)(uintptr_t)slot;
    ring.events[ring.header.tail].res = (unsigned long)result;
    ring.header.tail = (ring.header.tail + 1) % RING_ENTRIES;
}

static void stage(struct aio_queue *queue, uint32_t slot)
{
    struct aio_request request = {.length = 512, .opcode = IO_CMD_PREAD, .slot = slot};

    queue->staged[queue->staged_count++] = request;
}

static void reset(int first, int second, int third)
{
    memset(submit_answers, 0, sizeof submit_answers);
    submit_answers[0] = first;
    submit_answers[1] = second;
    submit_answers[2] = third;
    submit_calls = getevents_calls = taken_count = 0;
    memset(&ring, 0, sizeof ring);
    ring.header.entries = RING_ENTRIES;
    ring.header.magic = RING_MAGIC;
    ring.header.header_length = sizeof ring.header;
    ring.header.head = ring.header.tail = 3; /* so that it wraps */
}

static int full_ring_keeps_the_rest_staged_in_order(void)
{
    struct aio_queue *queue;

    reset(2, -EAGAIN, 0);
    CHECK(aio_queue_open(&queue, 4, 0, 1) == 0 && queue->reads_ring);
    for (uint32_t slot = 0; slot < 4; slot++)
        stage(queue, slot);
    CHECK(aio_queue_submit(queue) == 0);
    CHECK(queue->staged_count == 2 && queue->in_kernel == 2);
    complete(1, 512);
    complete(0, -EIO);
    CHECK(aio_queue_submit(queue) == 2);
    CHECK(queue->finished_slots[0] == 1 && queue->finished_results[0] == 512);
    CHECK(queue->finished_slots[1] == 0 && queue->finished_results[1] == -EIO);
    CHECK(queue->staged_count == 0 && queue->in_kernel == 2);
    CHECK(taken_count == 4 && taken[2] == 2 && taken[3] == 3);
    complete(2, 512);
    complete(3, 512);
    CHECK(aio_queue_reap(queue) == 2 && queue->in_kernel == 0); /* around the ring's end */
    CHECK(aio_queue_reap(queue) == 0);
    aio_queue_close(queue);
    return 0;
}

static int refused_request_is_finished_and_the_rest_goes_on(void)
{
    struct aio_queue *queue;

    reset(1, -EBADF, 0);
    CHECK(aio_queue_open(&queue, 4, 0, 1) == 0);
    for (uint32_t slot = 0; slot < 4; slot++)
        stage(queue, slot);
    CHECK(aio_queue_submit(queue) == 1);
    CHECK(queue->finished_slots[0] == 1 && queue->finished_results[0] == -EBADF);
    CHECK(queue->in_kernel == 3 && queue->staged_count == 0 && queue->refused_count == 0);
    CHECK(taken_count == 3 && taken[0] == 0 && taken[1] == 2 && taken[2] == 3);
    aio_queue_close(queue);
    return 0;
}

static int all_refused_fill_the_arrays_and_no_more(void)
{
    struct aio_queue *queue;

    reset(-EINVAL, -EINTR, -EINVAL);
    CHECK(aio_queue_open(&queue, 2, 0, 1) == 0);
    stage(queue, 1);
    stage(queue, 0);
    complete(0, 1); /* must wait: nothing of ours is in the kernel */
    CHECK(aio_queue_submit(queue) == 2);
    CHECK(queue->finished_slots[0] == 1 && queue->finished_slots[1] == 0);
    CHECK(queue->in_kernel == 0);
    aio_queue_close(queue);
    return 0;
}

static int unknown_ring_is_read_by_the_kernel(void)
{
    struct aio_queue *queue;

    reset(0, 0, 0);
    ring.header.incompat_features = 1;
    CHECK(aio_queue_open(&queue, 2, 0, 1) == 0 && !queue->reads_ring);
    stage(queue, 1);
    CHECK(aio_queue_submit(queue) == 1 && getevents_calls == 1);
    CHECK(queue->finished_slots[0] == 1 && queue->finished_results[0] == -EIO);
    CHECK(aio_queue_reap(queue) == 0 && getevents_calls == 1); /* nothing left to ask for */
    aio_queue_close(queue);
    return 0;
}

int main(void)
{
    return full_ring_keeps_the_rest_staged_in_order() +
           refused_request_is_finished_and_the_rest_goes_on() +
           all_refused_fill_the_arrays_and_no_more() + unknown_ring_is_read_by_the_kernel();
}
