/*
 * Virtqueues of hostile guests, and the in-flight region of a hostile front end: whatever stands in their memory, the ring
 * ends or its requests are answered, and nothing around the guest's memory is written. Each page that has changed has its bit
 * in the log of migrations, where one is kept. An input is options of the ring, the bytes of the guest's memory, which has
 * the ring at its start, and those of the in-flight region.
 */
#include <errno.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "fuzz.h"
#include "owners.h"
#include "vhost/vhost.h"

#define PAGE 4096u
#define REGION (8 * PAGE)
#define REGIONS 2u
#define ENTRIES 16u
#define MEMORY (REGIONS * REGION + 2 * PAGE)
#define GUEST 0x10000u
#define USER 0x700000u
#define CANARY 0x5c

static tapfs_vhost *device;
static struct owners owners;
static uint8_t *memory;
static uint8_t before[REGIONS * REGION];
static int inflight, migration, kick, call;

static size_t next(void *of, uint32_t queue, tapfs_parked *parked)
{
    return tapfs_vhost_next_parked(of, queue, parked, 1);
}

static int resume(void *of, uint64_t ticket, tapfs_parked *parked)
{
    return tapfs_vhost_resume_parked(of, ticket, parked);
}

static bool moves(const tapfs_parked *parked)
{
    return parked->request == TAPFS_VHOST_READ || parked->request == TAPFS_VHOST_WRITE;
}

static void complete(void *of, const tapfs_parked *parked)
{
    HOLD(parked->offset <= SIZE && parked->length <= SIZE - parked->offset);
    tapfs_vhost_complete(of, parked->ticket, 0);
}

int LLVMFuzzerInitialize(int *count, char ***words)
{
    static const struct front front = {next, resume, complete, moves};
    char path[64];

    (void)count;
    (void)words;
    snprintf(path, sizeof path, "/proc/self/fd/%d", memfd_create("image", 0));
    owned_disk_open(path);
    int guest = memfd_create("guest", MFD_CLOEXEC);
    inflight = memfd_create("inflight", MFD_CLOEXEC);
    migration = memfd_create("log", MFD_CLOEXEC);
    kick = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    call = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    HOLD(migration >= 0 && ftruncate(migration, PAGE) == 0);
    HOLD(guest >= 0 && inflight >= 0 && kick >= 0 && call >= 0 && ftruncate(guest, MEMORY) == 0);
    memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, guest, 0);
    device = tapfs_vhost_new(disk, SIZE, 1, "serial");
    HOLD(memory != MAP_FAILED && device != NULL);
    for (uint32_t i = 0; i < REGIONS; i++) {
        tapfs_vhost_region region = {GUEST + i * REGION, USER + i * REGION, REGION, PAGE + i * REGION};
        HOLD(tapfs_vhost_add_region(device, &region, guest) == 0);
    }
    owners_start(&owners, &front, device);
    return 0;
}

static void serve(const tapfs_vhost_ring *ring)
{
    tapfs_vhost_statistics counted;

    tapfs_vhost_counters(device, &counted);
    uint64_t kicks = counted.kicks;
    HOLD(eventfd_write(kick, 1) == 0);
    if (tapfs_vhost_start_ring(device, 0, ring) == 0) {
        /* It wakes up once it has taken all that there is. */
        while (counted.kicks == kicks) {
            sched_yield();
            tapfs_vhost_counters(device, &counted);
        }
        HOLD(tapfs_vhost_stop_ring(device, 0, 0) >= 0);
    }
    eventfd_t counter;
    eventfd_read(kick, &counter);
}

static void look_at_log(void)
{
    uint8_t log[PAGE];

    HOLD(pread(migration, log, sizeof log, 0) == (ssize_t)sizeof log);
    for (uint32_t i = 0; i < REGIONS * REGION / PAGE; i++) {
        uint32_t page = GUEST / PAGE + i;
        bool changed = memcmp(before + i * PAGE, memory + (i + 1) * PAGE, PAGE) != 0;
        HOLD(!changed || (log[page / 8] >> page % 8 & 1) != 0);
    }
    HOLD(ftruncate(migration, 0) == 0 && ftruncate(migration, PAGE) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    uint8_t options = take_byte(&input);
    uint16_t base = take_byte(&input), length;
    tapfs_vhost_ring ring = {
        .descriptors = USER,
        .available = USER + ENTRIES * 16,
        .used = USER + ENTRIES * 16 + 64,
        .entries = ENTRIES >> (options >> 6),
        .base = base,
        .kick = kick,
        .call = call,
        .error = -1,
        .event_index = options & 1,
        .indirect = options >> 1 & 1,
        .write_through = options >> 2 & 1,
        .logs = options >> 4 & 1,
        .logs_ring = 1,
        .used_in_guest = GUEST + ENTRIES * 16 + 64,
    };
    uint64_t tracked = tapfs_vhost_inflight_size(1, ENTRIES);

    take_bytes(&input, &length, sizeof length);
    memset(memory, CANARY, PAGE);
    memset(memory + PAGE, 0, REGIONS * REGION);
    memset(memory + PAGE + REGIONS * REGION, CANARY, PAGE);
    take_bytes(&input, memory + PAGE, length % (REGIONS * REGION));
    if (options & 8) {
        uint8_t *states = malloc(tracked);
        HOLD(states != NULL);
        take_bytes(&input, states, tracked);
        HOLD(ftruncate(inflight, (off_t)tracked) == 0 && pwrite(inflight, states, tracked, 0) == (ssize_t)tracked);
        free(states);
    }
    HOLD(tapfs_vhost_set_inflight(device, options & 8 ? inflight : -1, 0, options & 8 ? tracked : 0, options & 8 ? 1 : 0,
                                  options & 8 ? ENTRIES : 0) == 0);
    HOLD(tapfs_vhost_set_log(device, ring.logs ? migration : -1, 0, ring.logs ? PAGE : 0) == 0);
    memcpy(before, memory + PAGE, sizeof before);
    serve(&ring);
    if (ring.logs) {
        HOLD(tapfs_vhost_set_log(device, -1, 0, 0) == 0); /* before its file changes */
        look_at_log();
    }
    for (size_t i = 0; i < PAGE; i++) {
        HOLD(memory[i] == CANARY && memory[PAGE + REGIONS * REGION + i] == CANARY);
    }
    forget_map(disk, size % 8 * UNIT, UNIT);
    return 0;
}
