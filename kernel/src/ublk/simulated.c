/*
 * A queue without a kernel: a test plays the driver in a file in memory, by which the server is tried under sanitizers
 * and without a privilege. tests/unit/ublk/simulated_driver.py is the other side.
 *
 * The file has for each queue a header, a slot for each tag, and the memory of each tag. A slot has a state that each side
 * takes from the other's: ARMED by the server, GIVEN by the driver, TAKEN by the server, ARMED again with a result. With
 * zero copy that memory stands for the pages of the requests, and the server has other memory of its own.
 */
#include <poll.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ublk/internal.h"

enum { SLOT_ARMED = 1, SLOT_GIVEN = 2, SLOT_TAKEN = 3, SLOT_PASSED = 4 };

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

static size_t data_bytes(const tapfs_ublk_options *options)
{
    return (size_t)options->depth * options->max_bytes;
}

static size_t queue_bytes(const tapfs_ublk_options *options)
{
    return round_up(sizeof(struct simulated_queue), 4096) + data_bytes(options);
}

static uint8_t *pages_of(const struct ublk_queue *queue, uint32_t tag)
{
    return (uint8_t *)queue->simulated + round_up(sizeof(struct simulated_queue), 4096) +
           (size_t)tag * queue->server->options.max_bytes;
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
    queue->buffers = pages_of(queue, 0);
    if (options->zero_copy != 0) {
        queue->buffers = mmap(NULL, data_bytes(options), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (queue->buffers == MAP_FAILED) {
            queue->buffers = NULL;
            return errno;
        }
    }
    for (uint32_t tag = 0; tag < options->depth; tag++) {
        queue->requests[tag].data = queue->buffers + (size_t)tag * options->max_bytes;
    }
    return 0;
}

static void close_queue(struct ublk_queue *queue)
{
    const tapfs_ublk_options *options = &queue->server->options;

    if (options->zero_copy != 0 && queue->buffers != NULL) {
        munmap(queue->buffers, data_bytes(options));
    }
    if (queue->simulated != NULL) {
        munmap(queue->simulated, queue_bytes(options));
    }
}

static int fetch_all(struct ublk_queue *queue)
{
    for (uint32_t tag = 0; tag < queue->server->options.depth; tag++) {
        uint32_t state = atomic_load(&queue->simulated->slots[tag].state);
        /* What a predecessor had taken is given again. */
        atomic_store(&queue->simulated->slots[tag].state, state >= SLOT_GIVEN ? SLOT_GIVEN : SLOT_ARMED);
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

static bool pass(struct ublk_request *request, const struct mover_pass *pass)
{
    struct ublk_queue *queue = request->queue;
    struct simulated_slot *slot = &queue->simulated->slots[request->tag];
    uint8_t *pages = pages_of(queue, request->tag);
    ssize_t count = request->kind == TAPFS_UBLK_WRITE ? pwrite(pass->fd, pages, request->length, (off_t)pass->offset)
                                                     : pread(pass->fd, pages, request->length, (off_t)pass->offset);

    slot->result = (int32_t)(count < 0 ? -errno : count);
    atomic_store(&slot->state, SLOT_PASSED);
    ublk_wake(queue);
    return true;
}

static int copy(struct ublk_request *request)
{
    uint8_t *pages = pages_of(request->queue, request->tag);

    if (request->operation == OPERATION_WRITE) {
        memcpy(request->data, pages, request->length);
    } else {
        memcpy(pages, request->data, request->length);
    }
    return 0;
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
        } else if (state == SLOT_PASSED) {
            atomic_store(&simulated->slots[tag].state, SLOT_TAKEN);
            ublk_passed(request, simulated->slots[tag].result);
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
    .pass = pass,
    .copy = copy,
    .wait = wait_for_more,
    .close = close_queue,
};
