/* Worker threads, which finish moves by the engine's own functions; and these functions on scattered memory. */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "mover/internal.h"

/* ---- one move in the calling thread */

/* Copy between the parts and the bytes of the move from `from` on. */
static void copy_parts(const struct move *move, uint8_t *bytes, uint64_t from, uint64_t length, bool to_parts)
{
    uint64_t inner = from;
    for (const struct iovec *part = move->parts; length > 0; part++) {
        if (inner >= part->iov_len) {
            inner -= part->iov_len;
            continue;
        }
        uint64_t count = minimum(part->iov_len - inner, length);
        uint8_t *memory = (uint8_t *)part->iov_base + inner;
        if (to_parts) {
            memcpy(memory, bytes, count);
        } else {
            memcpy(bytes, memory, count);
        }
        bytes += count;
        length -= count;
        inner = 0;
    }
}

/* The bytes from `from` to the end of the move where they lie in one part; else NULL. */
static uint8_t *in_one_part(const struct move *move, uint64_t from)
{
    uint64_t inner = from;
    for (uint32_t i = 0; i < move->part_count; i++) {
        const struct iovec *part = &move->parts[i];
        if (inner < part->iov_len) {
            return part->iov_len - inner >= move->length - from ? (uint8_t *)part->iov_base + inner : NULL;
        }
        inner -= part->iov_len;
    }
    return NULL;
}

void move_now(tapfs_disk *disk, struct move *move)
{
    uint64_t done = move->outcome.done, left = move->length - done;
    uint8_t *straight = in_one_part(move, done);
    /* All at once, so that what needs a reservation is reported in one piece. */
    uint8_t *bounce = straight == NULL ? aligned_alloc(DIRECT_ALIGNMENT, round_up(left, DIRECT_ALIGNMENT)) : NULL;
    uint8_t *bytes = straight != NULL ? straight : bounce;

    if (bytes == NULL) {
        move->outcome = (tapfs_outcome){
            .status = TAPFS_FAILED,
            .error = ENOMEM,
            .done = done,
            .operation = move->writing ? "write" : "read",
        };
        return;
    }
    if (move->writing) {
        if (bounce != NULL) {
            copy_parts(move, bounce, done, left, false);
        }
        tapfs_write(disk, bytes, move->offset + done, left, 0, &move->outcome);
    } else {
        tapfs_read(disk, bytes, move->offset + done, left, 0, &move->outcome);
        if (bounce != NULL) {
            copy_parts(move, bounce, done, move->outcome.done, true);
        }
    }
    move->outcome.done += done;
    free(bounce);
}

/* ---- the threads */

/* Under the lock. */
static void report(struct workers *workers, struct move *move)
{
    move->next = NULL;
    *(workers->ended != NULL ? &workers->ended_last->next : &workers->ended) = move;
    workers->ended_last = move;
    if (!atomic_load(&workers->any_ended)) {
        atomic_store(&workers->any_ended, true);
        eventfd_write(workers->event_fd, 1);
    }
}

static void *work(void *argument)
{
    struct workers *workers = argument;

    pthread_mutex_lock(&workers->mutex);
    for (;;) {
        struct move *move = workers->first;
        if (move == NULL) {
            if (workers->stopping) {
                break;
            }
            workers->idle++;
            pthread_cond_wait(&workers->filled, &workers->mutex);
            workers->idle--;
            continue;
        }
        workers->first = move->next;
        workers->queued--;
        tapfs_disk *disk = workers->disk;
        pthread_mutex_unlock(&workers->mutex);
        move_now(disk, move);
        pthread_mutex_lock(&workers->mutex);
        report(workers, move);
    }
    pthread_mutex_unlock(&workers->mutex);
    return NULL;
}

/* Under the lock. 0 or an errno. */
static int start_one(struct workers *workers)
{
    sigset_t all, previous;

    /* The process's signals are for its other threads. A SIGBUS is the thread's own: of a guest's memory that vanished. */
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &previous);
    int error = pthread_create(&workers->threads[workers->count], NULL, work, workers);
    pthread_sigmask(SIG_SETMASK, &previous, NULL);
    workers->count += error == 0;
    return error;
}

int workers_start(struct workers *workers, tapfs_disk *disk, uint32_t limit)
{
    *workers = (struct workers){.disk = disk, .limit = limit, .event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    if (workers->event_fd < 0) {
        return errno;
    }
    workers->threads = calloc(limit, sizeof *workers->threads);
    if (workers->threads == NULL) {
        close(workers->event_fd);
        return ENOMEM;
    }
    pthread_mutex_init(&workers->mutex, NULL);
    pthread_cond_init(&workers->filled, NULL);
    pthread_mutex_lock(&workers->mutex);
    int error = start_one(workers);
    pthread_mutex_unlock(&workers->mutex);
    if (error != 0) {
        workers_stop(workers);
    }
    return error;
}

void workers_stop(struct workers *workers)
{
    pthread_mutex_lock(&workers->mutex);
    workers->stopping = true;
    pthread_cond_broadcast(&workers->filled);
    pthread_mutex_unlock(&workers->mutex);
    for (uint32_t i = 0; i < workers->count; i++) {
        pthread_join(workers->threads[i], NULL);
    }
    pthread_cond_destroy(&workers->filled);
    pthread_mutex_destroy(&workers->mutex);
    free(workers->threads);
    close(workers->event_fd);
}

void workers_set_disk(struct workers *workers, tapfs_disk *disk)
{
    pthread_mutex_lock(&workers->mutex);
    workers->disk = disk;
    pthread_mutex_unlock(&workers->mutex);
}

void workers_add(struct workers *workers, struct move *move)
{
    move->next = NULL;
    pthread_mutex_lock(&workers->mutex);
    *(workers->first != NULL ? &workers->last->next : &workers->first) = move;
    workers->last = move;
    /* A thread that was signalled counts as idle until it runs, so idle threads are compared with what is queued. */
    if (++workers->queued > workers->idle && workers->count < workers->limit) {
        (void)start_one(workers); /* the host's limit of threads: those that there are do it later */
    }
    pthread_cond_signal(&workers->filled);
    pthread_mutex_unlock(&workers->mutex);
}

void workers_report(struct workers *workers, struct move *move)
{
    pthread_mutex_lock(&workers->mutex);
    report(workers, move);
    pthread_mutex_unlock(&workers->mutex);
}

struct move *workers_ended(struct workers *workers)
{
    eventfd_t count;

    if (!atomic_load(&workers->any_ended)) {
        return NULL;
    }
    pthread_mutex_lock(&workers->mutex);
    struct move *ended = workers->ended;
    workers->ended = NULL;
    atomic_store(&workers->any_ended, false);
    eventfd_read(workers->event_fd, &count);
    pthread_mutex_unlock(&workers->mutex);
    return ended;
}
