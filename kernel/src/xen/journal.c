/*
 * The journal: the requests that were taken from the rings and not answered. It is a shared mapping of a file, so that
 * it outlives the process. The order of its stores makes a kill at any instant harmless (kernel/src/xen/JOURNAL.md).
 * One process at a time has it open.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "xen/internal.h"

#define JOURNAL_MAGIC UINT64_C(0x3172756f6a6e6578)

/* The state of an entry and an index stand in one word, so that they change at once. */
#define STATE_FREE UINT64_C(0)
#define STATE_TAKEN UINT64_C(1)    /* the index is the request's */
#define STATE_ANSWERED UINT64_C(2) /* the index is the response's */

struct journal_header {
    _Atomic uint64_t magic; /* last of all: the rest is whole */
    uint64_t bytes;
    uint32_t rings, protocol;
    uint8_t reserved[40];
};

/* A ring, and that it is this one: its pages and its port do not change while the frontend is connected. */
struct journal_ring {
    uint32_t entries, port, page_count;
    uint32_t references[RING_PAGES_MAX];
    _Atomic uint32_t consumed; /* everything before has been taken */
    uint8_t reserved[48];
};

struct xen_journal_entry {
    _Atomic uint64_t word;
    uint32_t index; /* of the request */
    uint32_t reserved;
    uint8_t bytes[REQUEST_BYTES_MAX];
};

_Static_assert(sizeof(struct journal_header) == 64 && sizeof(struct journal_ring) == 128 &&
                   sizeof(struct xen_journal_entry) == 128,
               "the file is the same for every build");

static struct journal_ring *ring_header(uint8_t *memory, const tapfs_xen *device, uint32_t number)
{
    size_t at = sizeof(struct journal_header);
    for (uint32_t i = 0; i < number; i++) {
        at += sizeof(struct journal_ring) + device->rings[i]->entries * sizeof(struct xen_journal_entry);
    }
    return (struct journal_ring *)(void *)(memory + at);
}

static size_t journal_bytes(const tapfs_xen *device)
{
    size_t bytes = sizeof(struct journal_header);
    for (uint32_t i = 0; i < device->ring_count; i++) {
        bytes += sizeof(struct journal_ring) + device->rings[i]->entries * sizeof(struct xen_journal_entry);
    }
    return bytes;
}

static bool fits(const tapfs_xen *device)
{
    const struct journal_header *header = (const struct journal_header *)(void *)device->journal.memory;
    if (atomic_load_explicit(&header->magic, memory_order_acquire) != JOURNAL_MAGIC ||
        header->bytes != device->journal.bytes || header->rings != device->ring_count ||
        header->protocol != device->options.protocol) {
        return false;
    }
    for (uint32_t i = 0; i < device->ring_count; i++) {
        const struct xen_ring *ring = device->rings[i];
        const struct journal_ring *known = ring_header(device->journal.memory, device, i);
        if (known->entries != ring->entries || known->port != ring->port || known->page_count != ring->page_count ||
            memcmp(known->references, ring->references, sizeof known->references) != 0) {
            return false;
        }
    }
    return true;
}

/* Rings from which nothing is taken: what the frontend was answered is what was taken. */
static void make_anew(const tapfs_xen *device)
{
    struct journal_header *header = (struct journal_header *)(void *)device->journal.memory;

    atomic_store_explicit(&header->magic, 0, memory_order_release);
    memset(device->journal.memory, 0, device->journal.bytes);
    header->bytes = device->journal.bytes;
    header->rings = device->ring_count;
    header->protocol = device->options.protocol;
    for (uint32_t i = 0; i < device->ring_count; i++) {
        const struct xen_ring *ring = device->rings[i];
        struct journal_ring *fresh = ring_header(device->journal.memory, device, i);
        fresh->entries = ring->entries;
        fresh->port = ring->port;
        fresh->page_count = ring->page_count;
        memcpy(fresh->references, ring->references, sizeof fresh->references);
        atomic_init(&fresh->consumed, xen_ring_responses(ring));
    }
    atomic_store_explicit(&header->magic, JOURNAL_MAGIC, memory_order_release);
}

int xen_journal_open(tapfs_xen *device)
{
    struct stat status;
    int fd = device->options.journal;

    device->journal.bytes = journal_bytes(device);
    off_t bytes = (off_t)device->journal.bytes;
    if (fstat(fd, &status) != 0) {
        return errno;
    }
    if (status.st_size != bytes && (ftruncate(fd, 0) != 0 || ftruncate(fd, bytes) != 0)) {
        return errno;
    }
    /* A page that the file system has no room for would be a signal later. */
    int error = posix_fallocate(fd, 0, bytes);
    if (error != 0) {
        return error;
    }
    void *memory = mmap(NULL, device->journal.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) {
        return errno;
    }
    device->journal.memory = memory;
    if (!fits(device)) {
        make_anew(device);
    }
    for (uint32_t i = 0; i < device->ring_count; i++) {
        struct journal_ring *header = ring_header(device->journal.memory, device, i);
        device->rings[i]->journal = (struct xen_journal_entry *)(void *)(header + 1);
        device->rings[i]->journal_consumed = &header->consumed;
    }
    return 0;
}

void xen_journal_close(tapfs_xen *device)
{
    if (device->journal.memory != NULL) {
        munmap(device->journal.memory, device->journal.bytes);
        device->journal.memory = NULL;
    }
}

/* Release: it happens after all stores that stand before it, also for who looks after a kill. */
static void set_word(struct xen_ring *ring, const struct xen_request *request, uint64_t state, uint32_t index)
{
    atomic_store_explicit(&ring->journal[request->number].word, state << 32 | index, memory_order_release);
}

uint8_t *xen_journal_bytes(struct xen_ring *ring, const struct xen_request *request)
{
    return ring->journal[request->number].bytes;
}

void xen_journal_take(struct xen_ring *ring, const struct xen_request *request, uint32_t index)
{
    ring->journal[request->number].index = index;
    set_word(ring, request, STATE_TAKEN, index);
}

void xen_journal_consumed(struct xen_ring *ring, uint32_t index)
{
    atomic_store_explicit(ring->journal_consumed, index, memory_order_release);
}

void xen_journal_answer(struct xen_ring *ring, const struct xen_request *request, uint32_t index)
{
    set_word(ring, request, STATE_ANSWERED, index);
}

void xen_journal_free(struct xen_ring *ring, const struct xen_request *request)
{
    set_word(ring, request, STATE_FREE, 0);
}

/* Whether the request of an entry has no published response. */
static bool unanswered(const struct xen_journal_entry *entry, uint32_t consumed, uint32_t published)
{
    uint64_t word = atomic_load_explicit(&entry->word, memory_order_acquire);
    uint32_t index = (uint32_t)word;

    switch (word >> 32) {
    case STATE_TAKEN:
        /* Not before it counts as consumed: until then the ring still has it, and it is taken from there. */
        return (int32_t)(index - consumed) < 0;
    case STATE_ANSWERED:
        return (int32_t)(index - published) >= 0;
    default:
        return false;
    }
}

static void sort_by_index(const struct xen_ring *ring, struct xen_request **batch, uint32_t count)
{
    for (uint32_t i = 1; i < count; i++) {
        struct xen_request *request = batch[i];
        uint32_t index = ring->journal[request->number].index, at = i;
        while (at > 0 && (int32_t)(ring->journal[batch[at - 1]->number].index - index) > 0) {
            batch[at] = batch[at - 1];
            at--;
        }
        batch[at] = request;
    }
}

bool xen_journal_recover(struct xen_ring *ring)
{
    uint32_t consumed = atomic_load_explicit(ring->journal_consumed, memory_order_acquire);
    uint32_t published = xen_ring_responses(ring);

    ring->requests_taken = consumed;
    ring->responses_written = ring->responses_published = published;
    ring->idle_requests = NULL;
    ring->batch_count = 0;
    for (uint32_t i = ring->entries; i-- > 0;) {
        struct xen_request *request = &ring->requests[i];
        if (unanswered(&ring->journal[i], consumed, published)) {
            xen_journal_take(ring, request, ring->journal[i].index);
            ring->batch[ring->batch_count++] = request;
        } else {
            xen_journal_free(ring, request);
            request->next = ring->idle_requests;
            ring->idle_requests = request;
        }
    }
    sort_by_index(ring, ring->batch, ring->batch_count);
    return ring->batch_count == consumed - published;
}
