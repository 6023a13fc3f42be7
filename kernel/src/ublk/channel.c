/*
 * A queue and the driver of the kernel: descriptors in shared memory, commands by io_uring. A command FETCH or
 * COMMIT_AND_FETCH completes when the driver has a request under its tag. docs/specs/ublk.md, "Commands of a queue".
 *
 * The queue's thread has one ring for these commands and for looks at its two other descriptors, so that one system call
 * commits, fetches and waits.
 */
#include <linux/io_uring.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "ublk/commands.h"
#include "ublk/internal.h"

/* No interrupt for each completion, and all work of the ring in its own system calls (Linux 6.1), or at least the former. */
#define BATCHED_COMPLETIONS (IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN)
#define LAZY_COMPLETIONS (IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG)

/* Tags of completions above those of requests. */
#define TAG_MOVER (UINT64_C(1) << 32)
#define TAG_WAKE (TAG_MOVER + 1)
#define TAG_PASS (UINT64_C(1) << 33) /* and the tag of the request */

static const uint8_t OPERATIONS[] = {COMMAND_OPCODE, IORING_OP_POLL_ADD, IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED};
static const uint8_t REGISTERS[] = {IORING_REGISTER_BUFFERS2};
static const struct io_rings_use USE = {
    .operations = OPERATIONS,
    .registers = REGISTERS,
    .operation_count = sizeof OPERATIONS,
    .register_count = sizeof REGISTERS,
    .entry_flags = IOSQE_ASYNC,
};

static size_t page_bytes(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

static int map_descriptors(struct ublk_queue *queue)
{
    const tapfs_ublk_options *options = &queue->server->options;
    size_t stride = round_up(DEPTH_MAX * sizeof(struct ublk_descriptor), page_bytes());

    queue->descriptor_bytes = round_up(options->depth * sizeof(struct ublk_descriptor), page_bytes());
    void *memory = mmap(NULL, queue->descriptor_bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, options->device,
                        (off_t)(queue->number * stride));
    if (memory == MAP_FAILED) {
        return errno;
    }
    queue->descriptors = memory;
    return 0;
}

static int map_buffers(struct ublk_queue *queue)
{
    const tapfs_ublk_options *options = &queue->server->options;
    size_t bytes = (size_t)options->depth * options->max_bytes;
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        return errno;
    }
    queue->buffers = memory;
    for (uint32_t tag = 0; tag < options->depth; tag++) {
        queue->requests[tag].data = queue->buffers + (size_t)tag * options->max_bytes;
    }
    return 0;
}

/* A table of the ring for the pages of requests, empty yet: one number for each tag. Linux 5.19. */
static int make_table(struct ublk_queue *queue)
{
    struct io_uring_rsrc_register table = {.nr = queue->server->options.depth, .flags = IORING_RSRC_REGISTER_SPARSE};
    long done = syscall(SYS_io_uring_register, queue->rings.fd, IORING_REGISTER_BUFFERS2, &table, sizeof table);
    return done < 0 ? errno : 0;
}

static int open_queue(struct ublk_queue *queue)
{
    /* A request has one command or transfer at a time; two more entries watch the mover and the eventfd. */
    uint32_t entries = queue->server->options.depth + 2;

    if (!io_rings_open(&queue->rings, entries, BATCHED_COMPLETIONS, &USE) &&
        (errno != EINVAL || !io_rings_open(&queue->rings, entries, LAZY_COMPLETIONS, &USE))) {
        return errno;
    }
    int error = map_descriptors(queue);
    if (error == 0) {
        error = map_buffers(queue);
    }
    return error == 0 && queue->server->options.zero_copy != 0 ? make_table(queue) : error;
}

static void close_queue(struct ublk_queue *queue)
{
    const tapfs_ublk_options *options = &queue->server->options;

    io_rings_close(&queue->rings);
    if (queue->descriptors != NULL) {
        munmap((void *)(uintptr_t)queue->descriptors, queue->descriptor_bytes);
    }
    if (queue->buffers != NULL) {
        munmap(queue->buffers, (size_t)options->depth * options->max_bytes);
    }
}

static bool queue_command(struct ublk_request *request, uint32_t command, int32_t result)
{
    struct ublk_queue *queue = request->queue;
    struct command_entry *entry = io_rings_entry(&queue->rings);

    if (entry == NULL) {
        return false;
    }
    entry->opcode = COMMAND_OPCODE;
    entry->fd = queue->server->options.device;
    entry->command = command;
    entry->user_data = request->tag;
    bool zero_copy = queue->server->options.zero_copy != 0;
    if (zero_copy) {
        entry->address = request->tag | BUFFER_MAY_FAIL;
    }
    *(struct queue_command *)(void *)entry->payload = (struct queue_command){
        .queue = (uint16_t)queue->number,
        .tag = request->tag,
        .result = result,
        .address = zero_copy ? 0 : (uintptr_t)request->data,
    };
    return true;
}

static bool pass(struct ublk_request *request, const struct mover_pass *pass)
{
    bool writing = request->kind == TAPFS_UBLK_WRITE;
    struct io_uring_sqe *entry = io_rings_entry(&request->queue->rings);

    if (entry == NULL) {
        return false;
    }
    *entry = (struct io_uring_sqe){
        .opcode = writing ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED,
        .flags = pass->by_thread ? IOSQE_ASYNC : 0,
        .fd = pass->fd,
        .off = pass->offset,
        .len = (uint32_t)request->length, /* from the first byte of the pages on: they have no address */
        .buf_index = request->tag,
        .user_data = TAG_PASS | request->tag,
    };
    return true;
}

static int copy(struct ublk_request *request)
{
    const struct ublk_queue *queue = request->queue;
    bool writing = request->operation == OPERATION_WRITE;
    uint64_t at = REQUEST_DATA + ((uint64_t)queue->number << REQUEST_QUEUE_SHIFT) +
                  ((uint64_t)request->tag << REQUEST_TAG_SHIFT);

    for (uint64_t done = 0; done < request->length;) {
        ssize_t count = writing ? pread(queue->server->options.device, request->data + done, request->length - done,
                                        (off_t)(at + done))
                                : pwrite(queue->server->options.device, request->data + done, request->length - done,
                                         (off_t)(at + done));
        if (count <= 0 && (count == 0 || errno != EINTR)) {
            return count == 0 ? EIO : errno;
        }
        done += count > 0 ? (uint64_t)count : 0;
    }
    return 0;
}

static int fetch_all(struct ublk_queue *queue)
{
    for (uint32_t tag = 0; tag < queue->server->options.depth; tag++) {
        if (!queue_command(&queue->requests[tag], COMMAND_FETCH, 0)) {
            return EAGAIN;
        }
    }
    return io_rings_submit(&queue->rings) ? 0 : errno;
}

static void commit(struct ublk_request *request, int32_t result)
{
    if (!queue_command(request, COMMAND_COMMIT_AND_FETCH, result)) {
        /* There is an entry for each tag, unless the kernel has not taken the last ones. */
        (void)io_rings_submit(&request->queue->rings);
        (void)queue_command(request, COMMAND_COMMIT_AND_FETCH, result);
    }
}

static void watch(struct ublk_queue *queue, int fd, uint64_t tag, bool *watching)
{
    struct io_uring_sqe *entry = *watching ? NULL : io_rings_entry(&queue->rings);
    if (entry != NULL) {
        entry->opcode = IORING_OP_POLL_ADD;
        entry->fd = fd;
        entry->poll32_events = POLLIN;
        entry->user_data = tag;
        *watching = true;
    }
}

static void completed(struct ublk_queue *queue, uint64_t tag, int32_t result, int *error)
{
    if (tag == TAG_MOVER) {
        queue->watching_mover = false;
    } else if (tag == TAG_WAKE) {
        queue->watching_wake = false;
        ublk_awake(queue);
    } else if ((tag & TAG_PASS) != 0) {
        ublk_passed(&queue->requests[tag & ~TAG_PASS], result);
    } else if (result == RESULT_REQUEST) {
        ublk_append(&queue->waiting, &queue->requests[tag]);
    } else {
        struct ublk_request *request = &queue->requests[tag];
        if (!request->gone) {
            request->gone = true;
            queue->gone++;
        }
        if (result != RESULT_ABORTED) {
            *error = -result;
        }
    }
}

static int wait_for_more(struct ublk_queue *queue, uint64_t nanoseconds)
{
    uint64_t tag;
    int32_t result;

    watch(queue, mover_fd(queue->mover), TAG_MOVER, &queue->watching_mover);
    watch(queue, queue->wake_fd, TAG_WAKE, &queue->watching_wake);
    int error = io_rings_wait(&queue->rings, nanoseconds);
    if (error == EINTR || error == ETIME || error == EBUSY || error == EAGAIN) {
        error = 0;
    }
    while (io_rings_next(&queue->rings, &tag, &result)) {
        completed(queue, tag, result, &error);
    }
    return error;
}

const struct ublk_channel ublk_driver = {
    .open = open_queue,
    .fetch = fetch_all,
    .commit = commit,
    .pass = pass,
    .copy = copy,
    .wait = wait_for_more,
    .close = close_queue,
};
