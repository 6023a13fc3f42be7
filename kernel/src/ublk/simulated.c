/*
 * A queue without a kernel: a test plays the driver in a file in memory, by which the server is tried under sanitizers
 * and without a privilege. tests/unit/ublk/simulated_driver.py is the other side.
 *
 * The file has for each queue a header, a slot for each tag, and the memory of each tag. A slot has a state that each side
 * takes from the other's: ARMED by the server, GIVEN by the driver, TAKEN by the server, ARMED again with a result.
 */
#include <poll.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "ublk/internal.h"

enum { SLOT_ARMED = 1, SLOT_GIVEN = 2, SLOT_TAKEN = 3 };

struct simulated_slot {
    _Atomic uint32_t state;
    int32_t result;
};

struct simulated_queue {
    int32_t given_fd;    /* an eventfd that the driver writes when it has given something */
    int32_t answered_fd; /* one that the server writes when it has answered */
    _Atomic uint32_t aborted; /* the device is no more */
    uint32_t reserved;
    struct ublk_descriptor descriptors[DEPTH_MAX];
    struct simulated_slot slots[DEPTH_MAX];
};

static size_t queue_bytes(const tapfs_ublk_options *options)
{
    return round_up(sizeof(struct simulated_queue), 4096) + (size_t)options->depth * options->max_bytes;
}

static int open_queue(struct ublk_queue *queue)
{
    const tapfs_ublk_options *options = &queue->server->options;
    void *memory = mmap(NULL, queue_bytes(options), PROT_READ | PROT_WRITE, MAP_SHARED, options->simulated,
                        (off_t)(queue->number * queue_bytes(options)));
    if (memory == MAP_FAILED) {
        return errno;
    }
    queue->simulated = memory;
    queue->descriptors = queue->simulated->descriptors;
    queue->buffers = (uint8_t *)memory + round_up(sizeof(struct simulated_queue), 4096);
    for (uint32_t tag = 0; tag < options->depth; tag++) {
        queue->requests[tag].data = queue->buffers + (size_t)tag * options->max_bytes;
    }
    return 0;
}

static void close_queue(struct ublk_queue *queue)
{
    if (queue->simulated != NULL) {
        munmap(queue->simulated, queue_bytes(&queue->server->options));
    }
}

static int fetch_all(struct ublk_queue *queue)
{
    for (uint32_t tag = 0; tag < queue->server->options.depth; tag++) {
        uint32_t state = atomic_load(&queue->simulated->slots[tag].state);
        /* What a predecessor had taken is given again. */
        atomic_store(&queue->simulated->slots[tag].state, state == SLOT_TAKEN || state == SLOT_GIVEN ? SLOT_GIVEN : SLOT_ARMED);
    }
    ublk_wake(queue);
    return 0;
}

static void commit(struct ublk_request *request, int32_t result)
{
    struct simulated_queue *simulated = request->queue->simulated;
    simulated->slots[request->tag].result = result;
    atomic_store(&simulated->slots[request->tag].state, SLOT_ARMED);
    eventfd_write(simulated->answered_fd, 1);
}

static void look(struct ublk_queue *queue)
{
    struct simulated_queue *simulated = queue->simulated;

    for (uint32_t tag = 0; tag < queue->server->options.depth; tag++) {
        struct ublk_request *request = &queue->requests[tag];
        uint32_t state = atomic_load(&simulated->slots[tag].state);
        if (state == SLOT_GIVEN) {
            atomic_store(&simulated->slots[tag].state, SLOT_TAKEN);
            ublk_append(&queue->waiting, request);
        } else if (state == SLOT_ARMED && atomic_load(&simulated->aborted) != 0 && !request->gone) {
            request->gone = true;
            queue->gone++;
        }
    }
}

static int wait_for_more(struct ublk_queue *queue, uint64_t nanoseconds)
{
    struct pollfd watched[] = {
        {.fd = queue->simulated->given_fd, .events = POLLIN},
        {.fd = mover_fd(queue->mover), .events = POLLIN},
        {.fd = queue->wake_fd, .events = POLLIN},
    };
    struct timespec time = {.tv_sec = (time_t)(nanoseconds / 1000000000u), .tv_nsec = (long)(nanoseconds % 1000000000u)};
    eventfd_t count;

    if (ppoll(watched, 3, nanoseconds == 0 ? NULL : &time, NULL) < 0 && errno != EINTR) {
        return errno;
    }
    if ((watched[0].revents & POLLIN) != 0) {
        eventfd_read(queue->simulated->given_fd, &count);
    }
    ublk_awake(queue);
    look(queue);
    return 0;
}

const struct ublk_channel ublk_simulated = {
    .open = open_queue,
    .fetch = fetch_all,
    .commit = commit,
    .wait = wait_for_more,
    .close = close_queue,
};
