/* The thread of a queue: fetches requests, begins them as far as pauses and the rate limit allow, ends with the device. */
#include <sys/eventfd.h>

#include "ublk/internal.h"

/* Say something of this queue under the server's lock, for whoever waits for it. */
static void settle(struct ublk_queue *queue, bool *what)
{
    tapfs_ublk *server = queue->server;
    pthread_mutex_lock(&server->lock);
    *what = true;
    pthread_cond_broadcast(&server->settled);
    pthread_mutex_unlock(&server->lock);
}

static void ended(const struct ublk_queue *queue, int problem)
{
    int none = 0;
    if (problem != 0) {
        atomic_compare_exchange_strong(&queue->server->problem, &none, problem);
    }
    eventfd_write(queue->server->ended_fd, 1);
}

/* Serve what is served now; nothing is in flight. */
static void take_over(struct ublk_queue *queue)
{
    tapfs_ublk *server = queue->server;
    pthread_mutex_lock(&server->lock);
    queue->served = server->served;
    queue->generation = atomic_load(&server->generation);
    mover_set_disk(queue->mover, queue->served.disk);
    pthread_cond_broadcast(&server->settled);
    pthread_mutex_unlock(&server->lock);
}

/* Begin what waits. Nanoseconds until the limit allows the next; 0: nothing waits for that. */
static uint64_t begin_waiting(struct ublk_queue *queue)
{
    tapfs_ublk *server = queue->server;

    while (queue->waiting.first != NULL && !atomic_load(&server->paused)) {
        uint64_t delay = rate_limit_delay(&server->limit);
        if (delay > 0) {
            return delay;
        }
        ublk_begin(ublk_take_first(&queue->waiting));
    }
    return 0;
}

/* At rest: tell it, and see whether another disk is to be served. */
static void rest(struct ublk_queue *queue)
{
    tapfs_ublk *server = queue->server;
    if (queue->in_flight > 0 || !atomic_load(&server->paused)) {
        return;
    }
    if (queue->generation != atomic_load(&server->generation)) {
        take_over(queue);
    }
    settle(queue, &queue->quiet);
}

static bool is_over(const struct ublk_queue *queue)
{
    return queue->in_flight == 0 &&
           (atomic_load(&queue->server->stopping) || queue->gone == queue->server->options.depth);
}

static void serve(struct ublk_queue *queue)
{
    int error = 0;

    for (;;) {
        ublk_take_back(queue);
        uint64_t delay = begin_waiting(queue);
        mover_submit(queue->mover);
        rest(queue);
        if (is_over(queue)) {
            break;
        }
        uint64_t since = delay > 0 ? rate_limit_now() : 0;
        ublk_count(&queue->counters.batches, 1);
        error = queue->server->channel->wait(queue, delay);
        if (delay > 0) {
            ublk_count(&queue->counters.throttled_ns, rate_limit_now() - since);
        }
        if (error != 0 && queue->gone < queue->server->options.depth) {
            queue->gone = queue->server->options.depth; /* no more requests; what is in flight is finished */
            ended(queue, error);
        }
        ublk_moved(queue);
    }
    if (!atomic_load(&queue->server->stopping)) {
        ended(queue, 0);
    }
}

/*
 * Wait until every queue can fetch; false: one cannot. Linux 6.12 does not survive the recovery of a device of which only
 * some queues had been fetched (docs/specs/ublk.md), so all queues fetch in the same moment.
 */
static bool await_others(tapfs_ublk *server)
{
    pthread_mutex_lock(&server->lock);
    while (!server->fetching && !atomic_load(&server->stopping)) {
        pthread_cond_wait(&server->settled, &server->lock);
    }
    bool all = server->fetching;
    pthread_mutex_unlock(&server->lock);
    return all;
}

void *ublk_queue_serve(void *argument)
{
    struct ublk_queue *queue = argument;
    const struct ublk_channel *channel = queue->server->channel;

    queue->error = channel->open(queue);
    settle(queue, &queue->opened);
    if (queue->error == 0) {
        queue->error = await_others(queue->server) ? channel->fetch(queue) : ECANCELED;
    }
    bool works = queue->error == 0;
    settle(queue, &queue->ready);
    if (works) {
        serve(queue);
    }
    /* Whoever waits for this queue to be quiet, or to take over a disk, waits no more, whatever ended it. */
    settle(queue, &queue->over);
    settle(queue, &queue->quiet);
    channel->close(queue);
    return NULL;
}
