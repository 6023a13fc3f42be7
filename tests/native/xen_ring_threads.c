/*
 * Everything that runs beside everything else in a Xen device, for ThreadSanitizer and AddressSanitizer: two guests' rings,
 * their threads and movers, owners that supply maps and places, and somebody who pauses, limits, swaps disks and counts.
 * usage: xen_ring_threads MACHINE FILE GRANTS ROUNDS; 0 and "ok", or a message and 1. MACHINE is an empty directory.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "owned_disk.h"
#include "xen/xen.h"

#define SECTOR 512u
#define RINGS 2u
#define ENTRIES 32u
#define ENTRY_BYTES 112u
#define SEGMENTS 4u
#define PAGES (RINGS * (1 + ENTRIES * SEGMENTS))
#define OWNERS 2

struct indices {
    _Atomic uint32_t req_prod, req_event, rsp_prod, rsp_event;
};

struct guest {
    pthread_t thread;
    uint32_t number, produced, consumed;
    struct indices *ring;
    int to_backend, to_frontend;
    struct {
        bool busy, reading;
        uint64_t sector;
        uint32_t sectors;
    } requests[ENTRIES];
};

static const char *machine;
static uint8_t *memory;
static tapfs_disk *disks[2];
static tapfs_xen *device;
static int rounds;
static atomic_bool over;

static char *path_of(const char *suffix)
{
    static _Thread_local char path[4096];
    snprintf(path, sizeof path, "%s/domain-7.%s", machine, suffix);
    return path;
}

static void *make_file(const char *suffix, size_t bytes)
{
    int fd = open(path_of(suffix), O_RDWR | O_CREAT | O_EXCL, 0600);
    REQUIRE(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
    void *mapped = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    REQUIRE(mapped != MAP_FAILED);
    close(fd);
    return mapped;
}

static int make_fifo(uint32_t port, const char *end)
{
    char suffix[64];
    snprintf(suffix, sizeof suffix, "port-%u.to-%s", port, end);
    REQUIRE(mkfifo(path_of(suffix), 0600) == 0);
    int fd = open(path_of(suffix), O_RDWR | O_NONBLOCK);
    REQUIRE(fd >= 0);
    return fd;
}

static uint8_t *page_of(const struct guest *guest, uint32_t request, uint32_t segment)
{
    return memory + (size_t)(RINGS + (guest->number * ENTRIES + request) * SEGMENTS + segment) * 4096;
}

/* The reference of a page is its number and eight. */
static uint32_t reference_of(const uint8_t *page)
{
    return (uint32_t)((page - memory) / 4096) + 8;
}

static uint8_t *slot_of(const struct guest *guest, uint32_t index)
{
    return (uint8_t *)guest->ring + 64 + index % ENTRIES * ENTRY_BYTES;
}

static void put(struct guest *guest, uint32_t number, unsigned *seed)
{
    uint8_t slot[ENTRY_BYTES] = {0};
    uint64_t id = number, sector = (uint64_t)rand_r(seed) % (SIZE / SECTOR - SEGMENTS * 8);
    uint32_t segments = 1 + (uint32_t)rand_r(seed) % SEGMENTS, count = 0;
    int choice = rand_r(seed) % 16;

    slot[0] = choice < 7 ? 0 : choice < 13 ? 1 : choice < 14 ? 2 : choice < 15 ? 3 : 5;
    if (slot[0] == 5) {
        /* Nothing that is on its way may lie in it, and here all may: a discard of nothing. */
        memcpy(slot + 16, &sector, 8);
    } else if (slot[0] != 3) {
        slot[1] = (uint8_t)segments;
        for (uint32_t i = 0; i < segments; i++) {
            uint8_t *page = page_of(guest, number, i);
            uint32_t reference = reference_of(page);
            memcpy(slot + 24 + 8 * i, &reference, 4);
            slot[24 + 8 * i + 5] = i + 1 < segments ? 7 : (uint8_t)(rand_r(seed) % 8);
            for (uint32_t j = 0; j < (slot[24 + 8 * i + 5] + 1u) * SECTOR; j++) {
                page[j] = slot[0] == 0 ? 0xff : byte_at(sector * SECTOR + (uint64_t)i * 4096 + j);
            }
            count += slot[24 + 8 * i + 5] + 1u;
        }
    }
    memcpy(slot + 8, &id, 8);
    memcpy(slot + 16, &sector, 8);
    memcpy(slot_of(guest, guest->produced), slot, sizeof slot);
    guest->produced++;
    guest->requests[number].busy = true;
    guest->requests[number].reading = slot[0] == 0;
    guest->requests[number].sector = sector;
    guest->requests[number].sectors = count;
}

static void push(struct guest *guest)
{
    uint32_t before = atomic_load(&guest->ring->req_prod);
    atomic_store(&guest->ring->req_prod, guest->produced);
    if (guest->produced - atomic_load(&guest->ring->req_event) < guest->produced - before) {
        ssize_t written = write(guest->to_backend, "", 1);
        (void)written;
    }
}

static void take(struct guest *guest)
{
    while (guest->consumed != atomic_load(&guest->ring->rsp_prod)) {
        uint64_t id;
        int16_t status;
        memcpy(&id, slot_of(guest, guest->consumed), sizeof id);
        memcpy(&status, slot_of(guest, guest->consumed) + 10, sizeof status);
        guest->consumed++;
        REQUIRE(id < ENTRIES && guest->requests[id].busy && status == 0);
        guest->requests[id].busy = false;
        for (uint32_t i = 0; guest->requests[id].reading && i < guest->requests[id].sectors * SECTOR; i++) {
            uint8_t byte = page_of(guest, (uint32_t)id, i / 4096)[i % 4096];
            REQUIRE(byte == 0 || byte == byte_at(guest->requests[id].sector * SECTOR + i));
        }
    }
}

static void await(struct guest *guest)
{
    struct pollfd wait = {.fd = guest->to_frontend, .events = POLLIN};
    char bytes[64];
    atomic_store(&guest->ring->rsp_event, guest->consumed + 1);
    if (atomic_load(&guest->ring->rsp_prod) == guest->consumed) {
        REQUIRE(poll(&wait, 1, 60000) == 1); /* else a notification was lost */
        while (read(guest->to_frontend, bytes, sizeof bytes) > 0) {
        }
    }
}

static void *be_guest(void *argument)
{
    struct guest *guest = argument;
    unsigned seed = guest->number + 1;
    int left = rounds;

    while (left > 0 || guest->consumed != guest->produced) {
        int burst = rand_r(&seed) % 2 == 0 ? 1 : rand_r(&seed) % 8;
        for (uint32_t i = 0; i < ENTRIES && burst > 0 && left > 0; i++) {
            if (!guest->requests[i].busy) {
                put(guest, i, &seed);
                burst--;
                left--;
            }
        }
        push(guest);
        /* Often look for responses for a while, and so put requests in just when the backend is about to wait. */
        for (int spins = rand_r(&seed) % 4 == 0 ? 0 : rand_r(&seed) % 300; spins > 0; spins--) {
            if (guest->consumed != atomic_load(&guest->ring->rsp_prod)) {
                break;
            }
        }
        take(guest);
        if (guest->consumed != guest->produced && (left == 0 || rand_r(&seed) % 4 == 0 || guest->produced - guest->consumed > 24)) {
            await(guest);
        }
    }
    return NULL;
}

static _Atomic(tapfs_disk *) served;

static void *own_moves(void *argument)
{
    uint32_t queue = *(const uint32_t *)argument;
    tapfs_parked parked;
    while (tapfs_xen_next_parked(device, queue, &parked, 1)) {
        tapfs_disk *now = atomic_load(&served); /* it does not change while something is parked */
        do {
            give_what_is_missing(now, &parked);
        } while (tapfs_xen_resume_parked(device, parked.ticket, &parked));
    }
    return NULL;
}

static void *own_others(void *argument)
{
    uint32_t queue = *(const uint32_t *)argument;
    tapfs_parked parked;
    while (tapfs_xen_next_parked(device, queue, &parked, 1)) {
        REQUIRE((parked.request == TAPFS_XEN_SYNC) == (queue == TAPFS_SYNCS));
        tapfs_outcome outcome;
        tapfs_sync(atomic_load(&served), &outcome);
        tapfs_xen_complete(device, parked.ticket, outcome.status == TAPFS_DONE ? 0 : EIO);
    }
    return NULL;
}

static void *disturb(void *argument)
{
    unsigned seed = 99;
    (void)argument;
    while (!atomic_load(&over)) {
        tapfs_xen_statistics counters;
        forget_map(atomic_load(&served), (uint64_t)rand_r(&seed) % SIZE, GRANULE);
        tapfs_disk_quiesce(disks[0]);
        tapfs_xen_counters(device, &counters);
        tapfs_xen_limit(device, rand_r(&seed) % 4 == 0 ? 100u << 20 : 0, rand_r(&seed) % 4 == 0 ? 50000 : 0);
        if (rand_r(&seed) % 4 == 0) {
            tapfs_xen_pause(device);
            tapfs_disk *next = disks[rand_r(&seed) % 2];
            forget_map(next, 0, SIZE);
            atomic_store(&served, next);
            tapfs_xen_set_disk(device, next, 1, 1);
            tapfs_xen_unpause(device);
        }
        usleep(300);
    }
    tapfs_xen_limit(device, 0, 0);
    return NULL;
}

static void run_guests(struct guest *guests)
{
    for (size_t i = 0; i < RINGS; i++) {
        pthread_create(&guests[i].thread, NULL, be_guest, &guests[i]);
    }
    for (size_t i = 0; i < RINGS; i++) {
        pthread_join(guests[i].thread, NULL);
    }
}

int main(int count, char **words)
{
    static struct guest guests[RINGS];
    pthread_t owners[OWNERS], others[2], disturber;

    REQUIRE(count == 5);
    machine = words[1];
    rounds = atoi(words[4]);
    int journal = memfd_create("journal", MFD_CLOEXEC);
    REQUIRE(journal >= 0);
    owned_disk_open(words[2]);
    disks[0] = disk;
    disks[1] = owned_disk_again();
    memory = make_file("memory", PAGES * 4096);
    uint32_t *grants = make_file("grants", (PAGES + 8) * 4);
    for (uint32_t page = 0; page < PAGES; page++) {
        grants[page + 8] = page << 2 | 1;
    }
    tapfs_xen_options options = {
        .machine = machine,
        .domain = 7,
        .protocol = TAPFS_XEN_X86_64,
        .grants = (uint32_t)atoi(words[3]),
        .indirect_segments = 16,
        .workers = 2,
        .journal = journal,
        .writable = 1,
        .discard = 1,
        .io_uring = rounds % 2 == 0, /* ThreadSanitizer sees the workers only */
    };
    atomic_store(&served, disks[0]);
    device = tapfs_xen_new(disks[0], &options);
    REQUIRE(device != NULL);
    for (uint32_t i = 0; i < RINGS; i++) {
        guests[i].number = i;
        guests[i].ring = (struct indices *)(void *)(memory + (size_t)i * 4096);
        guests[i].to_backend = make_fifo(i + 1, "backend");
        guests[i].to_frontend = make_fifo(i + 1, "frontend");
        atomic_store(&guests[i].ring->req_event, 1);
        atomic_store(&guests[i].ring->rsp_event, 1);
        REQUIRE(tapfs_xen_add_ring(device, &(uint32_t){i + 8}, 1, i + 1) == 0);
    }
    REQUIRE(tapfs_xen_start(device) == 0);
    for (size_t i = 0; i < 2; i++) {
        static const uint32_t queues[2] = {TAPFS_OTHERS, TAPFS_SYNCS};
        pthread_create(&others[i], NULL, own_others, (void *)(uintptr_t)&queues[i]);
    }
    for (size_t i = 0; i < OWNERS; i++) {
        static const uint32_t queues_of_owners[2] = {TAPFS_MOVES, TAPFS_WRITES};
        pthread_create(&owners[i], NULL, own_moves, (void *)(uintptr_t)&queues_of_owners[i % 2]);
    }
    pthread_create(&disturber, NULL, disturb, NULL);
    run_guests(guests);
    atomic_store(&over, true);
    pthread_join(disturber, NULL);
    /* And again with nobody who would wake a ring that has missed a notification. */
    run_guests(guests);
    tapfs_xen_statistics counters;
    tapfs_xen_counters(device, &counters);
    REQUIRE(counters.in_flight == 0 && tapfs_xen_problem(device) == NULL);
    REQUIRE(counters.reads + counters.writes + counters.flushes + counters.barriers + counters.discards ==
            (uint64_t)rounds * RINGS * 2);
    tapfs_xen_stop(device);
    for (size_t i = 0; i < OWNERS; i++) {
        pthread_join(owners[i], NULL);
    }
    pthread_join(others[0], NULL);
    pthread_join(others[1], NULL);
    tapfs_xen_free(device);
    tapfs_disk_free(disks[1]);
    owned_disk_close();
    close(journal);
    puts("ok");
    return 0;
}
