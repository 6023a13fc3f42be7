/*
 * A backend that is killed at every single step of its journal: before a request counts as taken, between a response and
 * its publication, and so on. usage: xen_ring_kills FOLDER GRANTS; "ok" and the number of steps, or a message and 1.
 *
 * Built with --wrap for each function of STEPS (tests/unit/xen/test_ring_journal.py): calls are counted, and the one that was chosen
 * is the process's last. Its successor is killed, too, further on; the third ends the work. The parent is the guest.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "xen/xen.h"
#include "xen/internal.h"

#define ENTRIES 32u
#define ENTRY_BYTES 112u
#define REQUESTS 48u
#define PAGES (1 + REQUESTS)
#define SIZE (REQUESTS * 4096u)

#define REQUIRE(condition) ((condition) ? (void)0 : die(#condition, __LINE__))

static uint8_t *memory;
static uint32_t *grants;
static struct {
    _Atomic uint32_t req_prod, req_event, rsp_prod, rsp_event;
} *ring;
static int journal, disk_file, to_backend, to_frontend;
static const char *folder;
static char domain_path[4096];
static unsigned step, last_step; /* 0: lives on */
static bool answered[REQUESTS];

static void die(const char *what, int line)
{
    fprintf(stderr, "line %d: %s (errno %d, killed at step %u)\n", line, what, errno, last_step);
    exit(1);
}

/* ---- the steps */

static void next_step(void)
{
    if (++step == last_step) {
        kill(getpid(), SIGKILL);
    }
}

#define STEP(type, name, parameters, arguments) \
    type __real_##name parameters;              \
    type __wrap_##name parameters;              \
    type __wrap_##name parameters               \
    {                                           \
        next_step();                            \
        __real_##name arguments;                \
    }

STEP(void, xen_journal_take, (struct xen_ring * r, const struct xen_request *q, uint32_t i), (r, q, i))
STEP(void, xen_journal_consumed, (struct xen_ring * r, uint32_t i), (r, i))
STEP(void, xen_journal_answer, (struct xen_ring * r, const struct xen_request *q, uint32_t i), (r, q, i))
STEP(void, xen_journal_free, (struct xen_ring * r, const struct xen_request *q), (r, q))
STEP(void, xen_move_run, (struct xen_ring * r), (r))
STEP(void, xen_notify, (struct xen_channel * c), (c))

/* ---- the backend, in a child */

static void serve(uint32_t kind)
{
    tapfs_layer layer = {.virtual_size = SIZE, .granule = 1, .map_unit = 1, .identity = 1, .writable = 1};
    tapfs_disk *disk = tapfs_disk_new(1 << 20);
    tapfs_xen_options options = {
        .machine = folder, .domain = 7, .grants = kind, .workers = 1, .journal = journal, .writable = 1};
    tapfs_parked parked;

    REQUIRE(disk != NULL && tapfs_disk_add_layer(disk, &layer) == 0);
    REQUIRE(tapfs_disk_add_file(disk, 0, disk_file, TAPFS_FILE_WRITABLE) == 0);
    tapfs_xen *device = tapfs_xen_new(disk, &options);
    REQUIRE(device != NULL && tapfs_xen_add_ring(device, &(uint32_t){8}, 1, 1) == 0);
    REQUIRE(tapfs_xen_start(device) == 0);
    /* The guest asks for nothing more: wait until all is answered, or for the end. */
    while (tapfs_xen_next_parked(device, TAPFS_SYNCS, &parked, 1)) {
        REQUIRE(parked.request == TAPFS_XEN_SYNC);
        tapfs_xen_complete(device, parked.ticket, 0);
    }
}

/* ---- the guest */

static uint8_t byte_of(uint32_t request)
{
    return (uint8_t)(request * 5 + 1);
}

static uint8_t *slot_of(uint32_t index)
{
    return (uint8_t *)ring + 64 + index % ENTRIES * ENTRY_BYTES;
}

/* Request number n writes its page to the sectors of its number; some are barriers, flushes or nonsense. */
static uint8_t operation_of(uint32_t request)
{
    return request % 11 == 10 ? 2 : request % 13 == 7 ? 3 : request % 17 == 5 ? 99 : 1;
}

static void put(uint32_t request)
{
    uint8_t slot[ENTRY_BYTES] = {operation_of(request)};
    uint64_t id = request, sector = request * 8;
    uint32_t reference = 9 + request;

    memcpy(slot + 8, &id, 8);
    memcpy(slot + 16, &sector, 8);
    if (slot[0] == 1 || slot[0] == 2) {
        slot[1] = 1;
        slot[29] = 7;
        memcpy(slot + 24, &reference, 4);
        memset(memory + (size_t)(1 + request) * 4096, byte_of(request), 4096);
    }
    memcpy(slot_of(request), slot, sizeof slot);
}

/* Take the responses, put in what there is room for. */
static uint32_t be_guest(uint32_t consumed)
{
    uint32_t produced = atomic_load(&ring->req_prod);

    while (consumed != atomic_load(&ring->rsp_prod)) {
        uint64_t id;
        int16_t status;
        memcpy(&id, slot_of(consumed), sizeof id);
        memcpy(&status, slot_of(consumed) + 10, sizeof status);
        REQUIRE(id < produced && !answered[id]);
        answered[id] = true;
        REQUIRE(slot_of(consumed)[8] == operation_of((uint32_t)id));
        REQUIRE(status == (operation_of((uint32_t)id) == 99 ? -2 : 0));
        /* It has been answered: the page is ours again, and a second write of it would show. */
        memset(memory + (size_t)(1 + id) * 4096, 0xff, 4096);
        consumed++;
    }
    while (produced < REQUESTS && produced - consumed < ENTRIES) {
        put(produced++);
    }
    atomic_store(&ring->req_prod, produced);
    ssize_t written = write(to_backend, "", 1);
    (void)written;
    return consumed;
}

/* One life of a backend, to its chosen end or until everything is answered; what the guest has consumed then. */
static uint32_t live(uint32_t kind, unsigned end, uint32_t consumed)
{
    char bytes[64];
    pid_t child;

    step = 0;
    last_step = end;
    child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
        serve(kind);
        exit(1);
    }
    int alive = (int)syscall(SYS_pidfd_open, child, 0);
    REQUIRE(alive >= 0);
    for (;;) {
        struct pollfd wait[2] = {{.fd = to_frontend, .events = POLLIN}, {.fd = alive, .events = POLLIN}};
        int status;
        consumed = be_guest(consumed);
        atomic_store(&ring->rsp_event, consumed + 1);
        if (consumed == atomic_load(&ring->rsp_prod) && consumed < REQUESTS) {
            REQUIRE(poll(wait, 2, 60000) > 0); /* else it has forgotten a request, or to notify */
        }
        while (read(to_frontend, bytes, sizeof bytes) > 0) {
        }
        if (waitpid(child, &status, WNOHANG) == child) {
            REQUIRE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
            close(alive);
            return be_guest(consumed);
        }
        if (consumed == REQUESTS) {
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
            close(alive);
            last_step = 0; /* it was not reached, or nothing was left to do */
            return consumed;
        }
    }
}

static void check_disk(void)
{
    uint8_t page[4096];
    for (uint32_t request = 0; request < REQUESTS; request++) {
        bool writes = operation_of(request) == 1 || operation_of(request) == 2;
        uint8_t expected = writes ? byte_of(request) : 0;
        REQUIRE(answered[request]);
        REQUIRE(pread(disk_file, page, sizeof page, (off_t)request * 4096) == (ssize_t)sizeof page);
        for (size_t i = 0; i < sizeof page; i++) {
            REQUIRE(page[i] == expected);
        }
    }
}

static void *make_file(const char *suffix, size_t bytes)
{
    snprintf(domain_path, sizeof domain_path, "%s/domain-7.%s", folder, suffix);
    int fd = open(domain_path, O_RDWR | O_CREAT | O_EXCL, 0600);
    REQUIRE(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
    void *mapped = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    REQUIRE(mapped != MAP_FAILED);
    close(fd);
    return mapped;
}

static int make_fifo(const char *suffix)
{
    snprintf(domain_path, sizeof domain_path, "%s/domain-7.port-1.to-%s", folder, suffix);
    REQUIRE(mkfifo(domain_path, 0600) == 0);
    int fd = open(domain_path, O_RDWR | O_NONBLOCK);
    REQUIRE(fd >= 0);
    return fd;
}

int main(int count, char **words)
{
    REQUIRE(count == 3);
    folder = words[1];
    uint32_t kind = (uint32_t)atoi(words[2]);
    memory = make_file("memory", PAGES * 4096);
    grants = make_file("grants", (PAGES + 8) * 4);
    for (uint32_t page = 0; page < PAGES; page++) {
        grants[page + 8] = page << 2 | 1;
    }
    ring = (void *)memory;
    to_backend = make_fifo("backend");
    to_frontend = make_fifo("frontend");
    journal = memfd_create("journal", 0);
    disk_file = memfd_create("disk", 0);
    REQUIRE(journal >= 0 && disk_file >= 0);

    unsigned first = 1, reached = 1;
    for (; reached != 0; first++) {
        memset(memory, 0, PAGES * 4096);
        memset(answered, 0, sizeof answered);
        atomic_store(&ring->req_event, 1);
        atomic_store(&ring->rsp_event, 1);
        REQUIRE(ftruncate(journal, 0) == 0 && ftruncate(disk_file, 0) == 0 && ftruncate(disk_file, SIZE) == 0);
        uint32_t consumed = live(kind, first, be_guest(0));
        reached = last_step;
        if (consumed < REQUESTS) {
            consumed = live(kind, first * 7 % 31 + 1, consumed);
        }
        if (consumed < REQUESTS) {
            consumed = live(kind, 0, consumed);
        }
        check_disk();
    }
    printf("ok %u\n", first - 2);
    return 0;
}
