/*
 * A guest for the ring benchmark: the one domain of a machine directory, with one native ring, many requests in flight.
 *
 * usage: ring_frontend DIRECTORY SEGMENTS PATTERN BYTES DEPTH SECONDS DISK_BYTES BACKEND_PID
 *
 * It makes the domain's files and says "ready"; the ring's pages are granted by the references from FIRST_REFERENCE
 * on, its port is PORT. A line on stdin starts it. A request of more than SEGMENTS pages is sent as several, each
 * right behind the one before, as Linux does where the backend has no indirect segments.
 */
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "workload.h"

#define DOMAIN "domain-1"
#define PORT "port-1"
#define FIRST_REFERENCE 8u
#define RING_PAGES 4u
#define RING_ENTRIES 128u
#define RING_HEADER 64u
#define SEGMENTS 11u
#define SEGMENTS_MAX 256u
#define READ 0
#define WRITE 1
#define INDIRECT 6

struct ring_head {
    _Atomic uint32_t req_prod, req_event, rsp_prod, rsp_event;
};

struct segment {
    uint32_t reference;
    uint8_t first_sector, last_sector;
    uint16_t padding;
};

union slot {
    struct {
        uint8_t operation, segments;
        uint16_t handle;
        uint32_t padding;
        uint64_t id, sector;
        struct segment list[SEGMENTS];
    } request;
    struct {
        uint8_t operation, inner;
        uint16_t segments;
        uint32_t padding;
        uint64_t id, sector;
        uint16_t handle, more_padding;
        uint32_t references[8];
    } indirect;
    struct {
        uint64_t id;
        uint8_t operation;
        int16_t status;
    } response;
};

_Static_assert(sizeof(union slot) == 112, "the native layout");

/* One request of the workload and its pages. */
struct transfer {
    uint64_t block;
    uint32_t left; /* ring requests not answered */
    uint32_t pages[SEGMENTS_MAX];
    uint32_t list_page; /* of segments, if indirect */
};

static struct workload work;
static uint32_t most_segments;
static uint8_t *memory;
static uint32_t memory_pages, next_page;
static struct ring_head *head;
static union slot *slots;
static uint32_t req_prod, rsp_cons;
static int to_backend, to_frontend;
static struct transfer *transfers;

static uint8_t *page_at(uint32_t page)
{
    return memory + (size_t)page * BLOCK;
}

/* In an order that leaves no two neighbours together, as a guest's machine pages are. */
static uint32_t allocate(void)
{
    return RING_PAGES + (next_page++ * 37u) % (memory_pages - RING_PAGES);
}

static int file_of(const char *directory, const char *suffix, bool fifo)
{
    char path[4096];

    snprintf(path, sizeof path, "%s/" DOMAIN ".%s", directory, suffix);
    REQUIRE(!fifo || mkfifo(path, 0600) == 0);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    REQUIRE(fd >= 0);
    return fd;
}

static void *file_in_memory(const char *directory, const char *suffix, size_t length)
{
    int fd = file_of(directory, suffix, false);

    REQUIRE(ftruncate(fd, (off_t)length) == 0);
    void *place = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    REQUIRE(place != MAP_FAILED);
    close(fd);
    return place;
}

/* The page of reference FIRST_REFERENCE + n is n: pages are scattered, and so are references. */
static void make_domain(const char *directory)
{
    uint32_t wanted = RING_PAGES + work.depth * (work.request_blocks + 1);

    for (memory_pages = 64; memory_pages - RING_PAGES < wanted; memory_pages *= 2) {
    }
    memory_pages += (memory_pages - RING_PAGES) % 37 == 0; /* allocate comes to every page */
    memory = file_in_memory(directory, "memory", (size_t)memory_pages * BLOCK);
    uint32_t *grants = file_in_memory(directory, "grants", (FIRST_REFERENCE + memory_pages) * sizeof *grants);
    for (uint32_t page = 0; page < memory_pages; page++) {
        grants[FIRST_REFERENCE + page] = page << 2 | 1;
    }
    to_backend = file_of(directory, PORT ".to-backend", true);
    to_frontend = file_of(directory, PORT ".to-frontend", true);
    head = (struct ring_head *)memory;
    slots = (union slot *)(memory + RING_HEADER);
    atomic_store(&head->req_event, 1);
    atomic_store(&head->rsp_event, 1);
    transfers = calloc(work.depth, sizeof *transfers);
    REQUIRE(transfers != NULL);
    for (uint32_t i = 0; i < work.depth; i++) {
        for (uint32_t block = 0; block < work.request_blocks; block++) {
            transfers[i].pages[block] = allocate();
        }
        transfers[i].list_page = allocate();
    }
}

static struct segment segment_of(uint32_t page)
{
    return (struct segment){.reference = FIRST_REFERENCE + page, .first_sector = 0, .last_sector = BLOCK / 512 - 1};
}

static void put(uint32_t number, uint32_t first, uint32_t count)
{
    struct transfer *transfer = &transfers[number];
    union slot *slot = &slots[req_prod++ % RING_ENTRIES];
    uint64_t sector = (transfer->block + first) * (BLOCK / 512);
    uint8_t operation = work.writing ? WRITE : READ;

    if (count > SEGMENTS) {
        slot->indirect.operation = INDIRECT;
        slot->indirect.inner = operation;
        slot->indirect.segments = (uint16_t)count;
        slot->indirect.handle = 0;
        slot->indirect.id = number;
        slot->indirect.sector = sector;
        slot->indirect.references[0] = FIRST_REFERENCE + transfer->list_page;
    } else {
        slot->request.operation = operation;
        slot->request.segments = (uint8_t)count;
        slot->request.handle = 0;
        slot->request.id = number;
        slot->request.sector = sector;
    }
    struct segment *list = count > SEGMENTS ? (struct segment *)page_at(transfer->list_page) : slot->request.list;
    for (uint32_t i = 0; i < count; i++) {
        list[i] = segment_of(transfer->pages[first + i]);
    }
}

static void begin(uint32_t number)
{
    struct transfer *transfer = &transfers[number];

    transfer->block = workload_next(&work);
    transfer->left = 0;
    for (uint32_t block = 0; work.writing && block < work.request_blocks; block++) {
        stamp(page_at(transfer->pages[block]), transfer->block + block);
    }
    for (uint32_t first = 0; first < work.request_blocks; first += most_segments) {
        uint32_t rest = work.request_blocks - first;
        put(number, first, rest < most_segments ? rest : most_segments);
        transfer->left++;
    }
}

static void push(void)
{
    uint32_t before = atomic_load_explicit(&head->req_prod, memory_order_relaxed);

    if (before == req_prod) {
        return;
    }
    atomic_store_explicit(&head->req_prod, req_prod, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    uint32_t event = atomic_load_explicit(&head->req_event, memory_order_relaxed);
    if (req_prod - event < req_prod - before) {
        REQUIRE(write(to_backend, "", 1) == 1);
    }
}

/* Transfers ended. The slot is taken over at once for the next if `again`. */
static uint32_t take_responses(bool again)
{
    uint32_t prod = atomic_load_explicit(&head->rsp_prod, memory_order_acquire), ended = 0;

    while (rsp_cons != prod) {
        const union slot *slot = &slots[rsp_cons % RING_ENTRIES];
        uint64_t number = slot->response.id;
        REQUIRE(number < work.depth && slot->response.status == 0);
        rsp_cons++;
        struct transfer *transfer = &transfers[number];
        REQUIRE(transfer->left > 0);
        if (--transfer->left > 0) {
            continue;
        }
        for (uint32_t block = 0; !work.writing && block < work.request_blocks; block++) {
            check_stamp(page_at(transfer->pages[block]), transfer->block + block);
        }
        ended++;
        if (again) {
            begin((uint32_t)number);
        }
    }
    return ended;
}

/* Sleep until the backend has answered something. */
static void await_responses(void)
{
    uint8_t taken[256];

    atomic_store_explicit(&head->rsp_event, rsp_cons + 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&head->rsp_prod, memory_order_relaxed) == rsp_cons) {
        struct pollfd ready = {.fd = to_frontend, .events = POLLIN};
        REQUIRE(poll(&ready, 1, 60000) == 1);
        REQUIRE(read(to_frontend, taken, sizeof taken) > 0);
    }
}

int main(int count, char **arguments)
{
    char line[16];

    REQUIRE(count == 9);
    most_segments = (uint32_t)atoi(arguments[2]);
    workload_read(&work, arguments + 3);
    uint32_t each = (work.request_blocks + most_segments - 1) / most_segments;
    REQUIRE(work.request_blocks <= SEGMENTS_MAX && work.depth * each <= RING_ENTRIES);
    make_domain(arguments[1]);
    puts("ready");
    fflush(stdout);
    REQUIRE(fgets(line, sizeof line, stdin) != NULL);
    workload_read(&work, arguments + 3); /* the clock starts now */
    for (uint32_t i = 0; i < work.depth; i++) {
        begin(i);
    }
    push();
    uint32_t ended = 0;
    do {
        await_responses();
        ended = take_responses(true);
        push();
    } while (workload_goes_on(&work, ended));
    for (uint32_t left = work.depth; left > 0;) {
        await_responses();
        left -= take_responses(false);
    }
    return 0;
}
