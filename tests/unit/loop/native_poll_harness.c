/* SPDX-License-Identifier: Apache-2.0
 *
 * The native poll: its waits and its handlers. Built and run by test_native_poll.py under sanitizers;
 * each check prints its line. */

#include <pthread.h>
#include <signal.h>
#include <sys/time.h>

#include "native_poll_harness.h"

/* --- waiting --- */

static void a_wait_lasts_until_its_deadline(void)
{
    struct native_poll *poll = poll_new();
    int64_t before = poll_clock();

    CHECK(native_poll_wait(poll, 2000000) == 0);
    CHECK(poll_clock() - before >= 2000000);
    CHECK(poll->sleeps == 1);
    CHECK(native_poll_wait(poll, 0) == 0 && poll->sleeps == 1);
    CHECK(native_poll_wait(poll, 1) == 0);
    native_poll_close(poll);
}

static void native_work_does_not_end_a_wait_and_does_not_hide_the_deadline(void)
{
    struct native_poll *poll = poll_new();
    struct actor *actor = actor_new(poll, 'a', eventfd_new(1));
    int64_t before = poll_clock();

    actor->reads = 1;
    poll_interest(poll, &actor->handler, EPOLLIN);
    CHECK(native_poll_wait(poll, 2000000) == 0);
    CHECK(poll_clock() - before >= 2000000 && diary_is("ra"));
    CHECK(poll->passes >= 2);
    close(actor->end);
    actor_drop(poll, actor);
    native_poll_close(poll);
}

static void python_descriptors_are_reported(void)
{
    struct native_poll *poll = poll_new();
    int fd = eventfd_new(1);

    CHECK(native_poll_watch(poll, fd, 0, EPOLLOUT) == 0);
    CHECK(native_poll_watch(poll, fd, EPOLLOUT, EPOLLIN | EPOLLOUT) == 0);
    CHECK(native_poll_wait(poll, -1) == 1 && poll->ready_count == 1);
    CHECK(poll->ready[0].fd == fd && poll->ready[0].events == (EPOLLIN | EPOLLOUT));
    CHECK(native_poll_watch(poll, fd, EPOLLIN | EPOLLOUT, 0) == 0);
    CHECK(native_poll_watch(poll, fd, EPOLLIN, 0) == 0); /* gone already */
    CHECK(native_poll_watch(poll, fd, EPOLLIN, EPOLLOUT) == 0); /* gone, and added anew */
    CHECK(native_poll_wait(poll, 0) == 1);
    close(fd);
    CHECK(native_poll_watch(poll, fd, EPOLLOUT, 0) == 0);
    CHECK(native_poll_watch(poll, fd, 0, EPOLLIN) == -EBADF);
    native_poll_close(poll);
}

enum { PINGS = 5000 };

struct game {
    int ping, pong;
};

static void *play(void *argument)
{
    struct game *game = argument;

    for (int i = 0; i < PINGS; i++) {
        uint64_t value;

        CHECK(write(game->ping, &(uint64_t){1}, 8) == 8);
        while (read(game->pong, &value, 8) != 8)
            CHECK(errno == EAGAIN || errno == EINTR);
    }
    return NULL;
}

static void no_wake_up_is_lost(void)
{
    struct native_poll *poll = poll_new();
    struct game game = {eventfd_new(0), eventfd_new(0)};
    pthread_t thread;

    CHECK(native_poll_watch(poll, game.ping, 0, EPOLLIN) == 0);
    CHECK(pthread_create(&thread, NULL, play, &game) == 0);
    poll->poll_max_ns = 20000;
    for (int i = 0; i < PINGS; i++) {
        uint64_t value;

        CHECK(native_poll_wait(poll, -1) == 1);
        CHECK(read(game.ping, &value, 8) == 8 && value == 1);
        CHECK(write(game.pong, &value, 8) == 8);
    }
    CHECK(pthread_join(thread, NULL) == 0);
    close(game.ping);
    close(game.pong);
    native_poll_close(poll);
}

static void on_signal(int number) { (void)number; }

static void a_signal_ends_the_sleep(void)
{
    struct native_poll *poll = poll_new();
    struct sigaction action = {.sa_handler = on_signal};
    struct itimerval often = {{0, 1000}, {0, 1000}}, never = {0};

    CHECK(sigaction(SIGALRM, &action, NULL) == 0);
    CHECK(setitimer(ITIMER_REAL, &often, NULL) == 0);
    CHECK(native_poll_wait(poll, -1) == -EINTR);
    CHECK(setitimer(ITIMER_REAL, &never, NULL) == 0);
    native_poll_close(poll);
}

/* --- handlers --- */

static void an_event_brings_python_back(void)
{
    struct native_poll *poll = poll_new();
    struct actor *actor = actor_new(poll, 'a', eventfd_new(1));

    actor->reads = actor->posts = 1;
    poll_interest(poll, &actor->handler, EPOLLIN);
    CHECK(native_poll_wait(poll, -1) == 1 && poll->ready_count == 0 && poll->event_count == 1);
    CHECK(poll->events[0].token == 'a' && poll->events[0].what == 1 && poll->events[0].value == 2);
    CHECK(native_poll_has_work(poll) && native_poll_wait(poll, -1) == 1); /* not taken yet */
    poll->event_count = 0;
    CHECK(!native_poll_has_work(poll) && native_poll_wait(poll, 0) == 0);
    CHECK(diary_is("ra"));
    close(actor->end);
    actor_drop(poll, actor);
    native_poll_close(poll);
}

static void reserved_events_fit_beside_those_of_handlers_that_left(void)
{
    struct native_poll *poll = poll_new();
    struct poll_handler handlers[3] = {0};

    for (int round = 0; round < 3; round++) {
        handlers[round].fd = eventfd_new(0);
        CHECK(poll_add(poll, &handlers[round], 1000) == 0);
        for (uint64_t i = 0; i < 1000; i++)
            poll_post(poll, (uint64_t)round, i, 0);
        poll_remove(poll, &handlers[round], 1000);
        close(handlers[round].fd);
    }
    CHECK(native_poll_wait(poll, -1) == 3000);
    CHECK(poll->events[2999].token == 2 && poll->events[2999].what == 999);
    native_poll_close(poll);
}

static void what_epoll_cannot_watch_is_no_handler(void)
{
    struct native_poll *poll = poll_new();
    struct poll_handler handler = {.fd = -1};

    CHECK(poll_add(poll, &handler, 1) == -EBADF);
    CHECK(poll->handlers == NULL && poll->handler_count == 0);
    native_poll_close(poll);
}

static void silence_holds_everything_but_flushes(void)
{
    struct native_poll *poll = poll_new();
    int ends[2];
    struct actor *actor;

    CHECK(pipe(ends) == 0);
    actor = actor_new(poll, 'a', ends[0]);
    poll_interest(poll, &actor->handler, EPOLLIN);
    close(ends[1]); /* a hang-up, which epoll reports unasked */
    CHECK(native_poll_wait(poll, 0) == 0 && diary_is("ha"));
    native_poll_silence(poll, 1);
    poll_again(poll, &actor->handler);
    poll_flush_later(poll, &actor->handler);
    CHECK(native_poll_has_work(poll));
    CHECK(native_poll_wait(poll, 1) == 0 && diary_is("fa"));
    CHECK(!native_poll_has_work(poll) && actor->handler.watched == 0);
    poll_interest(poll, &actor->handler, 0);
    poll_interest(poll, &actor->handler, EPOLLIN);
    CHECK(native_poll_wait(poll, 1) == 0 && diary_is(""));
    native_poll_silence(poll, 0);
    CHECK(native_poll_has_work(poll));
    CHECK(native_poll_wait(poll, 0) == 0 && diary_is("haga"));
    poll_interest(poll, &actor->handler, 0);
    CHECK(native_poll_wait(poll, 1) == 0 && diary_is("")); /* no hang-up either */
    actor_drop(poll, actor);
    close(ends[0]);
    native_poll_close(poll);
}

static void again_and_flush_come_once_a_pass_in_order(void)
{
    struct native_poll *poll = poll_new();
    struct actor *one = actor_new(poll, '1', eventfd_new(1));
    struct actor *two = actor_new(poll, '2', eventfd_new(0));

    poll_interest(poll, &one->handler, EPOLLIN);
    one->reads = 1;
    one->again = 1;
    one->flush_again = 1;
    poll_again(poll, &two->handler);
    poll_again(poll, &one->handler);
    poll_again(poll, &two->handler);
    poll_flush_later(poll, &one->handler);
    poll_flush_later(poll, &two->handler);
    CHECK(native_poll_wait(poll, 0) == 0 && diary_is("r1g2g1f1f2"));
    CHECK(native_poll_has_work(poll));
    CHECK(native_poll_wait(poll, 0) == 0 && diary_is("g1f1"));
    CHECK(!native_poll_has_work(poll));
    poll_again(poll, &two->handler);
    CHECK(native_poll_wait(poll, 1000000) == 0 && diary_is("g2")); /* at once, then to sleep */
    close(one->end);
    close(two->end);
    actor_drop(poll, one);
    actor_drop(poll, two);
    native_poll_close(poll);
}

static void a_removed_handler_is_never_called(void)
{
    struct native_poll *poll = poll_new();
    int fd = eventfd_new(1);
    struct actor *three = actor_new(poll, '3', eventfd_new(0));

    for (int first = 0; first < 2; first++) { /* whichever of the two epoll reports first */
        int other = eventfd_new(1);
        struct actor *actors[2] = {actor_new(poll, '0', fd), actor_new(poll, '1', other)};

        actors[first]->victim = actors[1 - first];
        for (int i = 0; i < 2; i++) {
            poll_interest(poll, &actors[i]->handler, EPOLLIN);
            poll_again(poll, &actors[i]->handler);
            poll_flush_later(poll, &actors[i]->handler);
        }
        poll_again(poll, &three->handler);
        poll_flush_later(poll, &three->handler);
        CHECK(native_poll_wait(poll, 0) == 0);
        CHECK(poll->handler_count == 2);
        CHECK(strstr(diary, first == 0 ? "g0g3f0f3" : "g1g3f1f3") != NULL);
        CHECK(diary_length <= 12);
        diary_length = 0;
        actor_drop(poll, actors[first]);
        close(other);
    }
    /* The last of a list goes, and another one comes behind the new last. */
    poll_again(poll, &three->handler);
    poll_flush_later(poll, &three->handler);
    poll_remove(poll, &three->handler, 4);
    CHECK(poll_add(poll, &three->handler, 4) == 0);
    CHECK(!native_poll_has_work(poll));
    poll_again(poll, &three->handler);
    CHECK(native_poll_wait(poll, 0) == 0 && diary_is("g3"));
    close(fd);
    close(three->end);
    actor_drop(poll, three);
    native_poll_close(poll);
}

/* --- adaptive polling --- */

static void spinning_adapts_as_qemu_does(void)
{
    struct native_poll *poll = poll_new();

    /* the poll, what it was, the maximum, how long it took until work came */
    CHECK(poll_adapt(poll, 0, 30000, 29000) == 4000);    /* work came: begin */
    CHECK(poll_adapt(poll, 4000, 30000, 3999) == 4000);  /* found while spinning: stay */
    CHECK(poll_adapt(poll, 4000, 30000, 5000) == 8000);
    poll->poll_grow = 3;
    CHECK(poll_adapt(poll, 8000, 30000, 9000) == 24000);
    CHECK(poll_adapt(poll, 24000, 30000, 29000) == 30000);
    poll->poll_shrink = 4;
    CHECK(poll_adapt(poll, 30000, 30000, 40000) == 7500);
    poll->poll_shrink = 0;
    CHECK(poll_adapt(poll, 7500, 30000, 40000) == 0);
    CHECK(poll_adapt(poll, 0, 1000, 500) == 1000);
    native_poll_close(poll);
}

int main(void)
{
    a_wait_lasts_until_its_deadline();
    native_work_does_not_end_a_wait_and_does_not_hide_the_deadline();
    python_descriptors_are_reported();
    no_wake_up_is_lost();
    a_signal_ends_the_sleep();
    an_event_brings_python_back();
    reserved_events_fit_beside_those_of_handlers_that_left();
    what_epoll_cannot_watch_is_no_handler();
    silence_holds_everything_but_flushes();
    again_and_flush_come_once_a_pass_in_order();
    a_removed_handler_is_never_called();
    spinning_adapts_as_qemu_does();
    return 0;
}
