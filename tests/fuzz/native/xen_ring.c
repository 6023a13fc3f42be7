/*
 * Rings of hostile guests (blkif): whatever a guest puts there, its ring ends or each request has one answer, and nothing
 * is written to a page that it has granted for reading alone. An input is the configuration, what the indices jump, how
 * each page is granted, up to 32 entries of the ring, and the bytes of the pages.
 */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "fuzz.h"
#include "owners.h"
#include "xen/xen.h"

#define PAGE 4096u
#define PAGES 16u
#define ENTRIES 32u
#define FIRST 8u /* the reference of the ring's page; those of the pages follow */
#define WAYS 6u

struct indices {
    _Atomic uint32_t requests_produced, requests_event, responses_produced, responses_event;
};

/* A guest and its device, for each protocol and way of granting. */
struct machine {
    char folder[64];
    uint8_t *memory;
    _Atomic uint32_t *grants;
    int to_backend, to_frontend, journal;
    uint32_t produced;
    tapfs_xen *device;
    struct owners owners;
};

static struct machine machines[WAYS];

static size_t next(void *device, uint32_t queue, tapfs_parked *parked)
{
    return tapfs_xen_next_parked(device, queue, parked, 1);
}

static int resume(void *device, uint64_t ticket, tapfs_parked *parked)
{
    return tapfs_xen_resume_parked(device, ticket, parked);
}

static bool moves(const tapfs_parked *parked)
{
    return parked->request == TAPFS_XEN_READ || parked->request == TAPFS_XEN_WRITE;
}

static void complete(void *device, const tapfs_parked *parked)
{
    HOLD(parked->offset <= SIZE && parked->length <= SIZE - parked->offset);
    tapfs_xen_complete(device, parked->ticket, 0);
}

static const struct front front = {next, resume, complete, moves};

static char *path_of(const struct machine *machine, const char *suffix)
{
    static char path[128];
    snprintf(path, sizeof path, "%s/domain-7.%s", machine->folder, suffix);
    return path;
}

static void *make_file(const struct machine *machine, const char *suffix, size_t bytes)
{
    int fd = open(path_of(machine, suffix), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    HOLD(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
    void *mapped = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    HOLD(mapped != MAP_FAILED);
    close(fd);
    return mapped;
}

static int make_fifo(const struct machine *machine, const char *suffix)
{
    HOLD(mkfifo(path_of(machine, suffix), 0600) == 0);
    int fd = open(path_of(machine, suffix), O_RDWR | O_NONBLOCK | O_CLOEXEC);
    HOLD(fd >= 0);
    return fd;
}

static struct indices *ring_of(const struct machine *machine)
{
    return (struct indices *)(void *)machine->memory;
}

static uint32_t entry_bytes(size_t way)
{
    return way % 2 == 0 ? 112 : 108;
}

/* A device, and a ring on which nothing is under way. */
static void start(struct machine *machine, size_t way)
{
    const tapfs_xen_options options = {
        .machine = machine->folder,
        .domain = 7,
        .protocol = way % 2 == 0 ? TAPFS_XEN_X86_64 : TAPFS_XEN_X86_32,
        .grants = way / 2 == 0 ? TAPFS_XEN_COPY : way / 2 == 1 ? TAPFS_XEN_MAP : TAPFS_XEN_PERSISTENT,
        .indirect_segments = 32,
        .workers = 1,
        .journal = machine->journal,
        .writable = 1,
        .discard = 1,
    };

    memset(machine->memory, 0, PAGE);
    atomic_store(&machine->grants[FIRST], 1);
    machine->produced = 0;
    HOLD(ftruncate(machine->journal, 0) == 0);
    machine->device = tapfs_xen_new(disk, &options);
    HOLD(machine->device != NULL && tapfs_xen_add_ring(machine->device, &(uint32_t){FIRST}, 1, 1) == 0);
    HOLD(tapfs_xen_start(machine->device) == 0);
    /* A guest that has its disk read into the ring's page asks for anything, and this one could not count the answers. */
    atomic_store(&machine->grants[FIRST], 0);
    owners_start(&machine->owners, &front, machine->device);
}

static void end(struct machine *machine)
{
    tapfs_xen_stop(machine->device);
    owners_end(&machine->owners);
    tapfs_xen_free(machine->device);
    machine->device = NULL;
}

static void make(struct machine *machine, size_t way)
{
    const char *above = getenv("TMPDIR");
    snprintf(machine->folder, sizeof machine->folder, "%s/tapfs-fuzz-XXXXXX", above == NULL || strlen(above) > 40 ? "/tmp" : above);
    HOLD(mkdtemp(machine->folder) != NULL);
    machine->memory = make_file(machine, "memory", (1 + PAGES) * PAGE);
    machine->grants = make_file(machine, "grants", (FIRST + 1 + PAGES) * 4);
    machine->to_backend = make_fifo(machine, "port-1.to-backend");
    machine->to_frontend = make_fifo(machine, "port-1.to-frontend");
    machine->journal = memfd_create("journal", MFD_CLOEXEC);
    HOLD(machine->journal >= 0);
    start(machine, way);
}

static void leave(void)
{
    static const char *const suffixes[] = {"memory", "grants", "port-1.to-backend", "port-1.to-frontend"};
    for (size_t i = 0; i < WAYS; i++) {
        for (size_t j = 0; machines[i].memory != NULL && j < sizeof suffixes / sizeof suffixes[0]; j++) {
            unlink(path_of(&machines[i], suffixes[j]));
        }
        if (machines[i].memory != NULL) {
            rmdir(machines[i].folder);
        }
    }
}

int LLVMFuzzerInitialize(int *count, char ***words)
{
    char path[64];

    (void)count;
    (void)words;
    snprintf(path, sizeof path, "/proc/self/fd/%d", memfd_create("image", 0));
    owned_disk_open(path);
    HOLD(atexit(leave) == 0);
    return 0;
}

/* Each answer is to a request that was made, and has one of three statuses. */
static void look_at_answers(const struct machine *machine, size_t way, uint32_t before, uint32_t count, const uint64_t *ids)
{
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *entry = machine->memory + 64 + (before + i) % ENTRIES * entry_bytes(way);
        uint64_t id;
        int16_t status;
        bool asked = false;
        memcpy(&id, entry, sizeof id);
        memcpy(&status, entry + 10, sizeof status);
        for (uint32_t j = 0; j < count; j++) {
            asked = asked || ids[j] == id;
        }
        HOLD(asked && status <= 0 && status >= -2);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    size_t way = take_byte(&input) % WAYS;
    struct machine *machine = &machines[way];
    uint64_t ids[ENTRIES];
    static uint8_t before_pages[PAGES * PAGE];

    if (machine->memory == NULL) {
        make(machine, way);
    } else if (machine->device == NULL) {
        start(machine, way);
    }
    uint8_t jump = take_byte(&input);
    uint32_t count = take_byte(&input) % (ENTRIES + 1), before = machine->produced;
    uint32_t granted = 0;
    for (uint32_t i = 0; i < PAGES; i++) {
        uint8_t word = i % 4 == 0 ? take_byte(&input) : (uint8_t)(granted >> 2);
        granted = word;
        /* Mostly granted for writing. */
        atomic_store(&machine->grants[FIRST + 1 + i], (i + 1) << 2 | ((word & 3) == 3 ? 3u : (word & 3) == 2 ? 0u : 1u));
    }
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *entry = machine->memory + 64 + (before + i) % ENTRIES * entry_bytes(way);
        take_bytes(&input, entry, entry_bytes(way));
        memcpy(&ids[i], entry + (way % 2 == 0 ? 8 : 4), sizeof ids[i]);
    }
    memset(machine->memory + PAGE, 0x6d, PAGES * PAGE);
    take_bytes(&input, machine->memory + PAGE, input.left < PAGES * PAGE ? input.left : PAGES * PAGE);
    memcpy(before_pages, machine->memory + PAGE, sizeof before_pages);

    struct indices *ring = ring_of(machine);
    uint32_t produced = before + count + (jump >= 0xf0 ? (uint32_t)(jump - 0xef) * 0x08000001u : 0);
    atomic_store(&ring->responses_event, before + count);
    atomic_store(&ring->requests_produced, produced);
    HOLD(write(machine->to_backend, "", 1) == 1 || errno == EAGAIN);
    while (atomic_load(&ring->responses_produced) != produced && tapfs_xen_problem(machine->device) == NULL) {
        sched_yield();
    }
    machine->produced = produced;
    for (char bytes[64]; read(machine->to_frontend, bytes, sizeof bytes) > 0;) {
    }
    if (tapfs_xen_problem(machine->device) != NULL) {
        end(machine);
    } else {
        look_at_answers(machine, way, before, count, ids);
    }
    for (uint32_t i = 0; i < PAGES; i++) {
        /* What stays mapped for writing was granted so before. */
        if (way / 2 != 2 && (atomic_load(&machine->grants[FIRST + 1 + i]) & 3) != 1) {
            HOLD(memcmp(machine->memory + (1 + i) * PAGE, before_pages + i * PAGE, PAGE) == 0);
        }
    }
    forget_map(disk, size % 8 * UNIT, UNIT);
    return 0;
}
