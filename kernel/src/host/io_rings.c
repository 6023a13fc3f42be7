/* The queues of io_uring by its system calls: mapped, filled, handed over, waited for. */
#include <errno.h>
#include <linux/io_uring.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "host/io_rings.h"

#define SECOND_NS 1000000000u
/* The most that a ring is allowed: operations, registrations, and the flags of entries. */
#define USES_MAX 16u

/* The kernel shares these words. A reader of a word sees everything that was written before the word. */
static uint32_t load(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static void store(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static int enter(const struct io_rings *rings, uint32_t submitted, uint32_t wanted, unsigned flags, const void *argument,
                 size_t bytes)
{
    return (int)syscall(SYS_io_uring_enter, rings->fd, submitted, wanted, flags, argument, bytes);
}

static void *map(int fd, size_t bytes, uint64_t what)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)what);
    return memory == MAP_FAILED ? NULL : memory;
}

static bool map_rings(struct io_rings *rings, const struct io_uring_params *parameters)
{
    const struct io_sqring_offsets *sq = &parameters->sq_off;
    const struct io_cqring_offsets *cq = &parameters->cq_off;

    rings->rings_bytes = maximum(sq->array + parameters->sq_entries * sizeof(uint32_t),
                                 cq->cqes + parameters->cq_entries * sizeof(struct io_uring_cqe));
    rings->entries_bytes = parameters->sq_entries * rings->entry_bytes;
    rings->rings = map(rings->fd, rings->rings_bytes, IORING_OFF_SQ_RING);
    rings->entries = map(rings->fd, rings->entries_bytes, IORING_OFF_SQES);
    if (rings->rings == NULL || rings->entries == NULL) {
        return false;
    }
    uint8_t *memory = rings->rings;
    rings->submit_head = (void *)(memory + sq->head);
    rings->submit_tail = (void *)(memory + sq->tail);
    rings->submit_flags = (void *)(memory + sq->flags);
    rings->submit_entries = parameters->sq_entries;
    rings->submit_mask = parameters->sq_entries - 1;
    rings->complete_head = (void *)(memory + cq->head);
    rings->complete_tail = (void *)(memory + cq->tail);
    rings->complete_entries = parameters->cq_entries;
    rings->complete_mask = parameters->cq_entries - 1;
    rings->completions = (void *)(memory + cq->cqes);
    /* The queue holds indices of entries: always the same ones for us. */
    uint32_t *array = (void *)(memory + sq->array);
    for (uint32_t i = 0; i < parameters->sq_entries; i++) {
        array[i] = i;
    }
    return true;
}

/* Have the kernel refuse all else, and begin to take entries. */
static bool limit(const struct io_rings *rings, const struct io_rings_use *use)
{
    struct io_uring_restriction all[USES_MAX];
    unsigned count = 0;

    memset(all, 0, sizeof all);
    for (unsigned i = 0; i < use->operation_count; i++) {
        all[count].opcode = IORING_RESTRICTION_SQE_OP;
        all[count++].sqe_op = use->operations[i];
    }
    for (unsigned i = 0; i < use->register_count; i++) {
        all[count].opcode = IORING_RESTRICTION_REGISTER_OP;
        all[count++].register_op = use->registers[i];
    }
    all[count].opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED;
    all[count++].sqe_flags = use->entry_flags;
    return syscall(SYS_io_uring_register, rings->fd, IORING_REGISTER_RESTRICTIONS, all, count) == 0 &&
           syscall(SYS_io_uring_register, rings->fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0) == 0;
}

bool io_rings_open(struct io_rings *rings, uint32_t entries, uint32_t flags, const struct io_rings_use *use)
{
    struct io_uring_params parameters = {.flags = IORING_SETUP_CLAMP | IORING_SETUP_R_DISABLED | flags};
    bool limited = true;

    *rings = (struct io_rings){.fd = (int)syscall(SYS_io_uring_setup, entries, &parameters)};
    if (rings->fd < 0 && errno == EINVAL) {
        limited = false;
        parameters = (struct io_uring_params){.flags = IORING_SETUP_CLAMP | flags};
        rings->fd = (int)syscall(SYS_io_uring_setup, entries, &parameters);
    }
    if (rings->fd < 0) {
        return false;
    }
    rings->entry_bytes = sizeof(struct io_uring_sqe) * ((flags & IORING_SETUP_SQE128) != 0 ? 2 : 1);
    /* One mapping for both queues: Linux 5.4. What is older has none for us. */
    if ((parameters.features & IORING_FEAT_SINGLE_MMAP) == 0) {
        errno = ENOSYS;
    } else if ((!limited || limit(rings, use)) && map_rings(rings, &parameters)) {
        return true;
    }
    int error = errno;
    io_rings_close(rings);
    errno = error;
    return false;
}

void io_rings_close(struct io_rings *rings)
{
    if (rings->entries != NULL) {
        munmap(rings->entries, rings->entries_bytes);
    }
    if (rings->rings != NULL) {
        munmap(rings->rings, rings->rings_bytes);
    }
    if (rings->fd >= 0) {
        close(rings->fd);
    }
    *rings = (struct io_rings){.fd = -1};
}

bool io_rings_full(const struct io_rings *rings)
{
    return rings->fd >= 0 && rings->queued_tail - load(rings->submit_head) == rings->submit_entries;
}

void *io_rings_entry(struct io_rings *rings)
{
    if (rings->fd < 0 || io_rings_full(rings) || rings->in_flight == rings->complete_entries) {
        return NULL;
    }
    void *entry = rings->entries + (rings->queued_tail & rings->submit_mask) * rings->entry_bytes;
    memset(entry, 0, rings->entry_bytes);
    rings->queued_tail++;
    rings->in_flight++;
    return entry;
}

bool io_rings_submit(struct io_rings *rings)
{
    if (rings->fd < 0) {
        return true;
    }
    store(rings->submit_tail, rings->queued_tail);
    for (;;) {
        /* An entry that the kernel rejects ends a submission early; it is completed like the others. */
        uint32_t waiting = rings->queued_tail - load(rings->submit_head);
        if (waiting == 0) {
            return true;
        }
        int taken = enter(rings, waiting, 0, 0, NULL, 0);
        if (taken == 0 || (taken < 0 && errno != EINTR)) {
            return false;
        }
    }
}

int io_rings_wait(struct io_rings *rings, uint64_t nanoseconds)
{
    struct __kernel_timespec time = {.tv_sec = (int64_t)(nanoseconds / SECOND_NS),
                                     .tv_nsec = (long long)(nanoseconds % SECOND_NS)};
    struct io_uring_getevents_arg argument = {.ts = nanoseconds == 0 ? 0 : (uintptr_t)&time};

    store(rings->submit_tail, rings->queued_tail);
    uint32_t waiting = rings->queued_tail - load(rings->submit_head);
    int taken = enter(rings, waiting, 1, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, &argument, sizeof argument);
    return taken < 0 ? errno : 0;
}

const void *io_rings_take_back(struct io_rings *rings)
{
    if (rings->fd < 0 || rings->queued_tail == load(rings->submit_head)) {
        return NULL;
    }
    rings->queued_tail--;
    store(rings->submit_tail, rings->queued_tail);
    rings->in_flight--;
    return rings->entries + (rings->queued_tail & rings->submit_mask) * rings->entry_bytes;
}

bool io_rings_next(struct io_rings *rings, uint64_t *tag, int32_t *result)
{
    if (rings->fd < 0 || rings->in_flight == 0) {
        return false;
    }
    uint32_t head = *rings->complete_head;
    if (head == load(rings->complete_tail)) {
        if ((load(rings->submit_flags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)) == 0) {
            return false;
        }
        enter(rings, 0, 0, IORING_ENTER_GETEVENTS, NULL, 0);
        if (head == load(rings->complete_tail)) {
            return false;
        }
    }
    const struct io_uring_cqe *completion = &rings->completions[head & rings->complete_mask];
    *tag = completion->user_data;
    *result = completion->res;
    store(rings->complete_head, head + 1);
    rings->in_flight--;
    return true;
}
