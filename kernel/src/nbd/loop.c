/*
 * A native thread of the server: it has connections, a mover, and all that is done for them.
 *
 * The thread waits for its sockets, its mover and what other threads give it. It takes what there is of all of them,
 * begins what was asked for, and then sends what is ready. So many requests of a client are answered by one message.
 */
#include <limits.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "nbd/internal.h"

/* Moves that are with the host at once, and threads for those that io_uring does not do. */
#define DEPTH 256u
#define WORKERS 16u
#define EVENTS 64
/* Clients have so many milliseconds to take their last answers. */
#define STOP_MILLISECONDS 2000u
#define NS_PER_MILLISECOND 1000000u
/* A wait that ends within so many nanoseconds is short: about what it costs to sleep and to be woken on both sides. */
#define SHORT_WAIT_NS 30000u
/* The most short waits that must follow each other before a thread that looked in vain looks again. */
#define SHORT_WAITS_MAX 1024u

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000u + (uint64_t)time.tv_nsec / 1000000u;
}

/* ---- what other threads ask for */

static bool add_under_lock(struct nbd_loop *loop, struct nbd_connection *connection)
{
    if (loop->stopping) {
        return false;
    }
    connection->next = loop->added;
    loop->added = connection;
    eventfd_write(loop->wake_fd, 1);
    return true;
}

bool nbd_loop_add(struct nbd_loop *loop, struct nbd_connection *connection)
{
    pthread_mutex_lock(&loop->lock);
    bool added = add_under_lock(loop, connection);
    pthread_mutex_unlock(&loop->lock);
    return added;
}

void nbd_loop_wake(struct nbd_loop *loop)
{
    eventfd_write(loop->wake_fd, 1);
}

void nbd_loop_stop(struct nbd_loop *loop)
{
    pthread_mutex_lock(&loop->lock);
    loop->stopping = true;
    eventfd_write(loop->wake_fd, 1);
    pthread_mutex_unlock(&loop->lock);
}

/* ---- in the thread */

static void link_connection(struct nbd_loop *loop, struct nbd_connection *connection)
{
    connection->previous = NULL;
    connection->next = loop->connections;
    if (loop->connections != NULL) {
        loop->connections->previous = connection;
    }
    loop->connections = connection;
    nbd_touch(connection);
}

static void unlink_connection(struct nbd_loop *loop, struct nbd_connection *connection)
{
    *(connection->previous != NULL ? &connection->previous->next : &loop->connections) = connection->next;
    if (connection->next != NULL) {
        connection->next->previous = connection->previous;
    }
}

static void over(struct nbd_connection *connection)
{
    tapfs_nbd *server = connection->loop->server;

    unlink_connection(connection->loop, connection);
    atomic_fetch_sub(&connection->loop->load, 1);
    nbd_connection_free(connection);
    atomic_fetch_sub(&server->connections, 1);
    eventfd_write(server->ended_fd, 1);
}

static void look_after_touched(struct nbd_loop *loop)
{
    struct nbd_connection *touched = loop->touched, *next;

    loop->touched = NULL;
    for (; touched != NULL; touched = next) {
        next = touched->next_touched;
        touched->touched = false;
        if (!nbd_connection_look_after(touched)) {
            if (touched->touched) {
                /* It put itself in front, and nobody came behind it since. */
                loop->touched = touched->next_touched;
            }
            over(touched);
        }
    }
}

static void each(struct nbd_loop *loop, void (*act)(struct nbd_connection *connection))
{
    for (struct nbd_connection *connection = loop->connections; connection != NULL; connection = connection->next) {
        act(connection);
    }
}

/* Have clients that wait for the rate limit go on when its time is over, or at once when it has changed. */
static void end_limit(struct nbd_loop *loop, bool at_once)
{
    if (loop->limited_until != 0 && (at_once || rate_limit_now() >= loop->limited_until)) {
        loop->limited_until = 0;
        each(loop, nbd_touch);
    }
}

/* Take what other threads have left here. */
static void take_given(struct nbd_loop *loop)
{
    eventfd_t count;

    pthread_mutex_lock(&loop->lock);
    eventfd_read(loop->wake_fd, &count);
    struct nbd_piece *returned = loop->returned;
    struct nbd_connection *added = loop->added;
    bool stopping = loop->stopping;
    loop->returned = NULL;
    loop->added = NULL;
    pthread_mutex_unlock(&loop->lock);
    for (struct nbd_connection *next; added != NULL; added = next) {
        next = added->next;
        link_connection(loop, added);
    }
    nbd_pieces_returned(returned);
    end_limit(loop, true); /* another limit, or the end, is a reason to be woken */
    if (stopping && loop->stop_at == 0) {
        loop->stop_at = now() + STOP_MILLISECONDS;
        each(loop, nbd_connection_end);
    }
}

/* Take over another disk, and say so if nothing is under way while the server is paused. */
static void settle(struct nbd_loop *loop)
{
    tapfs_nbd *server = loop->server;
    bool paused = atomic_load(&server->paused);

    if (!paused) {
        if (loop->held) {
            loop->held = false;
            each(loop, nbd_touch);
        }
        return;
    }
    loop->held = true;
    if (loop->under_way > 0) {
        return;
    }
    pthread_mutex_lock(&server->lock);
    if (loop->generation != atomic_load(&server->generation)) {
        loop->generation = atomic_load(&server->generation);
        mover_set_disk(loop->mover, server->disk);
        pthread_cond_broadcast(&server->settled);
    }
    /* Not after the end of the pause, which has taken it back. */
    if (!loop->quiet && atomic_load(&server->paused)) {
        loop->quiet = true;
        pthread_cond_broadcast(&server->settled);
    }
    pthread_mutex_unlock(&server->lock);
}

/* How long to wait, in milliseconds: until the rate limit lets a client go on, or while the loop stops until it cuts its
 * clients. */
static int patience(const struct nbd_loop *loop, bool cut)
{
    if (loop->touched != NULL) {
        return 0;
    }
    if (loop->limited_until != 0) {
        uint64_t time = rate_limit_now();
        uint64_t left = loop->limited_until > time ? loop->limited_until - time : 0;
        return (int)minimum((left + NS_PER_MILLISECOND - 1) / NS_PER_MILLISECOND, INT_MAX);
    }
    if (loop->stop_at == 0 || cut) {
        return -1;
    }
    uint64_t time = now();
    return time >= loop->stop_at ? 0 : (int)(loop->stop_at - time);
}

/* Nothing is added once it stops, and a piece that is still to be given back keeps its connection. */
static bool has_ended(const struct nbd_loop *loop)
{
    return loop->stop_at != 0 && loop->connections == NULL;
}

/* ---- waiting */

/*
 * A client that has one request at a time asks again a few microseconds after its answer. To sleep so shortly costs both
 * sides more than the request: the thread's way into sleep and out of it, and the client's call that wakes it. So
 * after short waits the thread does not sleep at once, it looks again for as long as a short wait takes. Looks that
 * find nothing become rare: each doubles the number of short waits that have to come before the next one.
 */
static bool looks_again(const struct nbd_loop *loop)
{
    return loop->short_waits_needed > 0 && loop->short_waits >= loop->short_waits_needed;
}

/* A processor of its own is what a look needs: else it takes the client's. */
static void begin_waits(struct nbd_loop *loop)
{
    cpu_set_t allowed;
    bool several = sched_getaffinity(0, sizeof allowed, &allowed) < 0 || CPU_COUNT(&allowed) > 1;
    loop->short_waits_needed = several ? 1 : 0;
}

static void note_wait(struct nbd_loop *loop, bool looked, bool in_time)
{
    if (in_time) {
        loop->short_waits += loop->short_waits < SHORT_WAITS_MAX;
        loop->short_waits_needed -= looked && loop->short_waits_needed > 1;
        return;
    }
    loop->short_waits = 0;
    if (looked) {
        loop->short_waits_needed = (uint32_t)minimum(loop->short_waits_needed * 2u, SHORT_WAITS_MAX);
    }
}

/* As epoll_wait, with its `patience` in milliseconds. */
static int wait_for_events(struct nbd_loop *loop, struct epoll_event *events, int patience)
{
    if (patience == 0 || loop->short_waits_needed == 0) {
        return epoll_wait(loop->epoll_fd, events, EVENTS, patience);
    }
    uint64_t start = rate_limit_now();
    bool looks = looks_again(loop);
    int count = 0;
    if (looks) {
        do {
            count = epoll_wait(loop->epoll_fd, events, EVENTS, 0);
        } while (count == 0 && rate_limit_now() - start < SHORT_WAIT_NS);
    }
    if (count == 0) {
        count = epoll_wait(loop->epoll_fd, events, EVENTS, patience);
    }
    note_wait(loop, looks, rate_limit_now() - start < SHORT_WAIT_NS);
    return count;
}

static void *serve(void *argument)
{
    struct nbd_loop *loop = argument;
    struct epoll_event events[EVENTS];
    bool cut = false;

    begin_waits(loop);
    while (!has_ended(loop)) {
        int count = wait_for_events(loop, events, patience(loop, cut));
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr == &loop->wake_fd) {
                take_given(loop);
            } else if (events[i].data.ptr == &loop->mover) {
                nbd_pieces_moved(loop);
            } else {
                nbd_connection_ready(events[i].data.ptr, events[i].events);
            }
        }
        end_limit(loop, false);
        if (loop->stop_at != 0 && !cut && now() >= loop->stop_at) {
            cut = true;
            each(loop, nbd_connection_cut);
        }
        look_after_touched(loop);
        mover_submit(loop->mover);
        settle(loop);
    }
    return NULL;
}

/* ---- life */

static int watch(struct nbd_loop *loop, int fd, void *mark)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = mark};
    return epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0 ? errno : 0;
}

static int start_watching(struct nbd_loop *loop)
{
    int error = watch(loop, loop->wake_fd, &loop->wake_fd);
    if (error == 0) {
        error = watch(loop, mover_fd(loop->mover), &loop->mover);
    }
    return error != 0 ? error : pthread_create(&loop->thread, NULL, serve, loop);
}

static void close_parts(struct nbd_loop *loop)
{
    nbd_memory_free(loop);
    if (loop->mover != NULL) {
        mover_free(loop->mover);
    }
    if (loop->wake_fd >= 0) {
        close(loop->wake_fd);
    }
    if (loop->epoll_fd >= 0) {
        close(loop->epoll_fd);
    }
}

int nbd_loop_start(struct nbd_loop *loop, tapfs_nbd *server)
{
    int error = 0;

    loop->server = server;
    pthread_mutex_init(&loop->lock, NULL);
    loop->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    loop->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    loop->mover = mover_new(server->disk, DEPTH, WORKERS, RING_MORTAL);
    if (loop->epoll_fd < 0 || loop->wake_fd < 0 || loop->mover == NULL) {
        error = errno;
    } else {
        error = start_watching(loop);
    }
    if (error != 0) {
        close_parts(loop);
        nbd_loop_free(loop);
    }
    return error;
}

void nbd_loop_join(struct nbd_loop *loop)
{
    pthread_join(loop->thread, NULL);
    close_parts(loop);
}

void nbd_loop_free(struct nbd_loop *loop)
{
    pthread_mutex_destroy(&loop->lock);
}
