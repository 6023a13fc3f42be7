/* Threads that read windows of a disk in the order in which they were added. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

#include "common.h"
#include "copying/internal.h"

enum state { WAITING, BEGUN, ENDED };

struct place {
    tapfs_window *window;
    enum state state;
};

struct tapfs_window_reader {
    tapfs_disk *disk;
    pthread_mutex_t mutex;
    pthread_cond_t added; /* or stopping; threads wait for it */
    pthread_cond_t ended; /* a window; the owner waits for it */
    pthread_mutex_t writing; /* one thread at a time writes to a target; taken alone */
    bool stopping;
    uint32_t thread_count, capacity;
    uint64_t first, next; /* numbers of windows: those from `first` to before `next` are here */
    pthread_t *threads;
    tapfs_packers *packers; /* the owner's */
    struct place *places; /* of window N: N modulo capacity */
};

static struct place *place_of(const tapfs_window_reader *reader, uint64_t number)
{
    return &reader->places[number % reader->capacity];
}

/* The first window that nobody has begun is begun from now on; NULL: there is none. Under the lock. */
static struct place *begin_one(const tapfs_window_reader *reader)
{
    for (uint64_t number = reader->first; number < reader->next; number++) {
        struct place *place = place_of(reader, number);
        if (place->state == WAITING) {
            place->state = BEGUN;
            return place;
        }
    }
    return NULL;
}

/* Under the lock, which is let go of meanwhile. `packers` are the thread's. */
static void read_window(tapfs_window_reader *reader, struct place *place, tapfs_packers **packers)
{
    tapfs_window *window = place->window;
    size_t zeros = 0;

    pthread_mutex_unlock(&reader->mutex);
    if (window->target != NULL) {
        copy_window(window, reader->disk, &reader->writing);
    } else {
        tapfs_read_ranges(reader->disk, window->ranges, window->range_count, 0, window->buffer, &window->outcome);
        if (window->outcome.status == TAPFS_DONE && window->codec != TAPFS_CODEC_NONE) {
            pack_window(window, packers);
        } else if (window->outcome.status == TAPFS_DONE) {
            window->segment_count = tapfs_find_segments(window->ranges, window->range_count, window->buffer, NULL,
                                                        window->granule, window->segments, NULL, &zeros);
        }
    }
    pthread_mutex_lock(&reader->mutex);
    place->state = ENDED;
    pthread_cond_signal(&reader->ended);
}

static void *work(void *argument)
{
    tapfs_window_reader *reader = argument;
    tapfs_packers *packers = NULL;

    pthread_mutex_lock(&reader->mutex);
    while (!reader->stopping) {
        struct place *place = begin_one(reader);
        if (place == NULL) {
            pthread_cond_wait(&reader->added, &reader->mutex);
        } else {
            read_window(reader, place, &packers);
        }
    }
    pthread_mutex_unlock(&reader->mutex);
    tapfs_packers_free(packers);
    return NULL;
}

static void start_threads(tapfs_window_reader *reader, uint32_t threads)
{
    sigset_t all, previous;

    /* The process's signals are for its other threads. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &previous);
    while (reader->thread_count < threads &&
           pthread_create(&reader->threads[reader->thread_count], NULL, work, reader) == 0) {
        reader->thread_count++;
    }
    pthread_sigmask(SIG_SETMASK, &previous, NULL);
}

tapfs_window_reader *tapfs_window_reader_new(tapfs_disk *disk, uint32_t threads, uint32_t capacity)
{
    tapfs_window_reader *reader = calloc(1, sizeof *reader);

    if (reader == NULL) {
        return NULL;
    }
    reader->disk = disk;
    reader->capacity = capacity;
    reader->places = calloc((size_t)capacity + 1, sizeof *reader->places);
    reader->threads = calloc((size_t)threads + 1, sizeof *reader->threads);
    if (reader->places == NULL || reader->threads == NULL) {
        free(reader->places);
        free(reader->threads);
        free(reader);
        return NULL;
    }
    pthread_mutex_init(&reader->mutex, NULL);
    pthread_cond_init(&reader->added, NULL);
    pthread_cond_init(&reader->ended, NULL);
    pthread_mutex_init(&reader->writing, NULL);
    start_threads(reader, threads);
    return reader;
}

void tapfs_window_reader_free(tapfs_window_reader *reader)
{
    if (reader == NULL) {
        return;
    }
    pthread_mutex_lock(&reader->mutex);
    reader->stopping = true;
    pthread_cond_broadcast(&reader->added);
    pthread_mutex_unlock(&reader->mutex);
    for (uint32_t i = 0; i < reader->thread_count; i++) {
        pthread_join(reader->threads[i], NULL);
    }
    pthread_cond_destroy(&reader->ended);
    pthread_cond_destroy(&reader->added);
    pthread_mutex_destroy(&reader->mutex);
    pthread_mutex_destroy(&reader->writing);
    tapfs_packers_free(reader->packers);
    free(reader->places);
    free(reader->threads);
    free(reader);
}

int tapfs_window_reader_add(tapfs_window_reader *reader, tapfs_window *window)
{
    int error = 0;

    pthread_mutex_lock(&reader->mutex);
    if (reader->next - reader->first == reader->capacity) {
        error = ENOSPC;
    } else {
        *place_of(reader, reader->next++) = (struct place){.window = window, .state = WAITING};
        pthread_cond_signal(&reader->added);
    }
    pthread_mutex_unlock(&reader->mutex);
    return error;
}

int tapfs_window_reader_ready(tapfs_window_reader *reader)
{
    pthread_mutex_lock(&reader->mutex);
    int ready = reader->first < reader->next && place_of(reader, reader->first)->state == ENDED;
    pthread_mutex_unlock(&reader->mutex);
    return ready;
}

tapfs_window *tapfs_window_reader_take(tapfs_window_reader *reader)
{
    tapfs_window *window = NULL;

    pthread_mutex_lock(&reader->mutex);
    if (reader->first < reader->next) {
        struct place *oldest = place_of(reader, reader->first);
        while (oldest->state != ENDED) {
            struct place *place = begin_one(reader); /* the oldest itself, if nobody has begun it */
            if (place != NULL) {
                read_window(reader, place, &reader->packers);
            } else {
                pthread_cond_wait(&reader->ended, &reader->mutex);
            }
        }
        window = oldest->window;
        reader->first++;
    }
    pthread_mutex_unlock(&reader->mutex);
    return window;
}
