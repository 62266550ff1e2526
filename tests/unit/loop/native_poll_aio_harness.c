/* SPDX-License-Identifier: Apache-2.0
 *
 * The native poll's AIO, and the buffers for it. Built and run by test_native_poll.py under
 * sanitizers; the argument is a file of FILE_PAGES pages, each full of its number. Each check prints
 * its line. */

#include "native_poll_harness.h"

enum { PAGE = 4096, FILE_PAGES = 64 };

static int file;
static int io_is_starting; /* inside poll_io_start: no `done` may run */

struct job {
    struct poll_io io;
    struct pool_buffer *buffer;
    struct poll_handler *flusher;
    int64_t result;
    int is_done;
    int again; /* start anew, when done, so many times */
};

static int jobs_done;

static void start(struct native_poll *poll, struct job *job)
{
    io_is_starting++;
    job->is_done = 0;
    poll_io_start(poll, &job->io);
    io_is_starting--;
}

static void job_done(struct native_poll *poll, struct poll_io *io, int64_t result)
{
    struct job *job = (struct job *)io;

    CHECK(!io_is_starting && !job->is_done);
    job->is_done = 1;
    job->result = result;
    jobs_done++;
    if (job->again-- > 0)
        start(poll, job);
    else if (job->flusher != NULL)
        poll_flush_later(poll, job->flusher);
}

static void job_make(struct native_poll *poll, struct job *job, int number)
{
    memset(job, 0, sizeof *job);
    job->buffer = buffer_take(poll->buffers, PAGE);
    CHECK(job->buffer != NULL && job->buffer->address % PAGE == 0);
    job->io.address = job->buffer->address;
    job->io.length = PAGE;
    job->io.offset = (int64_t)(number % FILE_PAGES) * PAGE;
    job->io.fd = file;
    job->io.opcode = IO_CMD_PREAD;
    job->io.done = job_done;
}

static void job_check(struct native_poll *poll, struct job *job)
{
    const uint8_t *bytes = (const uint8_t *)(uintptr_t)job->buffer->address;

    CHECK(job->is_done && job->result == PAGE);
    CHECK(bytes[0] == job->io.offset / PAGE && bytes[PAGE - 1] == bytes[0]);
    buffer_give(poll->buffers, job->buffer);
}

static struct native_poll *aio_poll_new(uint32_t depth)
{
    struct native_poll *poll = poll_new();

    CHECK(native_poll_open_aio(poll, depth) == 0);
    script(0, 0);
    jobs_done = 0;
    return poll;
}

/* Waits until `count` jobs are done. */
static void wait_for_jobs(struct native_poll *poll, int count)
{
    while (jobs_done < count)
        CHECK(native_poll_wait(poll, 1000000) == 0);
    CHECK(jobs_done == count);
}

static void requests_are_done_and_their_flush_follows(void)
{
    struct native_poll *poll = aio_poll_new(16);
    struct actor *actor = actor_new(poll, 'a', eventfd_new(0));
    struct job job;

    job_make(poll, &job, 3);
    job.flusher = &actor->handler;
    start(poll, &job);
    CHECK(submit_calls == 0 && native_poll_has_work(poll));
    wait_for_jobs(poll, 1);
    CHECK(submit_calls == 1 && diary_is("fa"));
    job_check(poll, &job);
    CHECK(poll->aio_free_count == 16);
    close(actor->end);
    actor_drop(poll, actor);
    native_poll_close(poll);
}

static void full_batches_leave_at_once_and_slots_run_out(int reads_ring)
{
    struct native_poll *poll = aio_poll_new(16);
    struct job jobs[100];

    poll->aio->reads_ring = poll->aio->reads_ring && reads_ring;
    for (int i = 0; i < 100; i++) {
        job_make(poll, &jobs[i], i);
        jobs[i].again = i % 3;
        start(poll, &jobs[i]);
        CHECK(submit_calls == (i < 15 ? (i + 1) / 8 : 2));
    }
    CHECK(poll->aio_free_count == 0 && poll->aio_waiting_first == &jobs[16].io);
    wait_for_jobs(poll, 100 + 33 + 2 * 33);
    for (int i = 0; i < 100; i++)
        job_check(poll, &jobs[i]);
    CHECK(poll->aio_free_count == 16 && poll->aio_waiting_first == NULL);
    CHECK(poll->aio->in_kernel == 0 && poll->aio->staged_count == 0);
    CHECK(!native_poll_has_work(poll));
    native_poll_close(poll);
}

static void no_room_in_the_kernel_is_no_error(void)
{
    struct native_poll *poll = aio_poll_new(32);
    struct job jobs[20];

    script(-EAGAIN, -EAGAIN);
    for (int i = 0; i < 20; i++) {
        job_make(poll, &jobs[i], i);
        start(poll, &jobs[i]);
    }
    CHECK(submit_calls == 1 && poll->aio->staged_count == 20); /* refused once, so not tried again */
    CHECK(native_poll_has_work(poll)); /* who sleeps elsewhere must come back */
    CHECK(native_poll_wait(poll, 0) == 0 && submit_calls == 2);
    wait_for_jobs(poll, 20);
    for (int i = 0; i < 20; i++)
        job_check(poll, &jobs[i]);
    native_poll_close(poll);
}

static void refused_requests_end_with_their_errno(void)
{
    struct native_poll *poll = aio_poll_new(16);
    struct job jobs[9];

    for (int i = 0; i < 9; i++) {
        job_make(poll, &jobs[i], i);
        if (i == 2 || i == 8)
            jobs[i].io.fd = -1;
        start(poll, &jobs[i]);
    }
    CHECK(jobs_done == 0); /* the first eight have been submitted */
    CHECK(native_poll_has_work(poll));
    wait_for_jobs(poll, 9);
    for (int i = 0; i < 9; i++) {
        if (i == 2 || i == 8) {
            CHECK(jobs[i].result == -EBADF);
            buffer_give(poll->buffers, jobs[i].buffer);
        } else {
            job_check(poll, &jobs[i]);
        }
    }
    native_poll_close(poll);
}

static void a_request_of_the_last_callback_leaves_with_the_pass(void)
{
    struct native_poll *poll = aio_poll_new(16);
    struct job job;
    int fd = eventfd_new(1);

    CHECK(native_poll_watch(poll, fd, 0, EPOLLIN) == 0);
    job_make(poll, &job, 1);
    job.again = 1;
    start(poll, &job);
    while (jobs_done == 0)
        CHECK(native_poll_wait(poll, -1) == 1);
    CHECK(poll->aio->staged_count == 0); /* started by done, and on its way while Python works */
    while (jobs_done < 2)
        CHECK(native_poll_wait(poll, -1) == 1);
    job_check(poll, &job);
    close(fd);
    native_poll_close(poll);
}

static void spinning_finds_work_and_keeps_the_deadline(void)
{
    struct native_poll *poll = aio_poll_new(16);
    struct job job;
    int64_t before;

    poll->poll_max_ns = poll->poll_ns = poll->poll_io_ns = INT64_C(60) * 1000000000;
    before = poll_clock();
    CHECK(native_poll_wait(poll, 1000000) == 0);
    CHECK(poll_clock() - before >= 1000000);
    CHECK(poll->sleeps == 0 && poll->spins_missed == 1);
    job_make(poll, &job, 5);
    start(poll, &job);
    wait_for_jobs(poll, 1);
    job_check(poll, &job);
    CHECK(poll->sleeps == 0);
    native_poll_close(poll);
}

static void spinning_for_the_disk_adapts_by_itself(void)
{
    struct native_poll *poll = aio_poll_new(16);

    poll->poll_max_ns = INT64_C(3600) * 1000000000;
    poll->aio->in_kernel = 1; /* as if the disk worked */
    CHECK(native_poll_wait(poll, 1000000) == 0);
    CHECK(poll->poll_io_ns == 4000 && poll->poll_ns == 0);
    poll->aio->in_kernel = 0;
    CHECK(native_poll_wait(poll, 1000000) == 0);
    CHECK(poll->poll_io_ns == 4000 && poll->poll_ns == 4000);
    poll->poll_max_ns = 50000; /* the disk may take ten times as long as that */
    poll->poll_io_ns = poll->poll_ns = 20000;
    poll->aio->in_kernel = 1;
    CHECK(native_poll_wait(poll, 10000000) == 0);
    CHECK(poll->poll_io_ns == 0 && poll->poll_ns == 20000);
    poll->aio->in_kernel = 0;
    native_poll_close(poll);
}

/* --- buffers --- */

static void buffers_are_reused_last_in_first_out_within_bounds(void)
{
    struct buffer_pool *pool = buffer_pool_open(16 * PAGE);
    struct pool_buffer *one = buffer_take(pool, 0), *two = buffer_take(pool, PAGE);
    struct pool_buffer *big = buffer_take(pool, 8 * PAGE + 1), *huge;
    uint64_t lengths[] = {1, PAGE, PAGE + 1, 1 << 20, (1 << 20) + 1, 32 << 20};

    CHECK(one->capacity == PAGE && two->capacity == PAGE && big->capacity == 16 * PAGE);
    buffer_give(pool, one);
    buffer_give(pool, two);
    CHECK(pool->retained == 2 * PAGE);
    buffer_give(pool, big); /* over the bound: unmapped */
    CHECK(pool->retained == 2 * PAGE);
    CHECK(buffer_take(pool, 1) == two && buffer_take(pool, 1) == one && pool->retained == 0);
    buffer_give(pool, one);
    buffer_give(pool, two);
    for (unsigned i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        huge = buffer_take(pool, lengths[i]);
        CHECK(huge != NULL && huge->capacity >= lengths[i] && huge->address % PAGE == 0);
        CHECK(huge->capacity < 2 * lengths[i] || huge->capacity == PAGE);
        ((uint8_t *)(uintptr_t)huge->address)[lengths[i] - 1] = 1;
        buffer_give(pool, huge);
    }
    CHECK(buffer_take(pool, (32 << 20) + 1) == NULL);
    CHECK(buffer_take(pool, UINT64_MAX) == NULL);
    buffer_pool_close(pool);
}

int main(int count, char **arguments)
{
    CHECK(count == 2);
    file = open(arguments[1], O_RDONLY | O_CLOEXEC | O_DIRECT);
    if (file < 0)
        file = open(arguments[1], O_RDONLY | O_CLOEXEC); /* a filesystem without O_DIRECT */
    CHECK(file >= 0);
    requests_are_done_and_their_flush_follows();
    full_batches_leave_at_once_and_slots_run_out(1);
    full_batches_leave_at_once_and_slots_run_out(0);
    no_room_in_the_kernel_is_no_error();
    refused_requests_end_with_their_errno();
    a_request_of_the_last_callback_leaves_with_the_pass();
    spinning_finds_work_and_keeps_the_deadline();
    spinning_for_the_disk_adapts_by_itself();
    buffers_are_reused_last_in_first_out_within_bounds();
    return 0;
}
