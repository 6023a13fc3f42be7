/*
 * The peer of ring_frontend.c: the same requests to a vhost-user-blk backend (qemu-storage-daemon), whose ring is
 * virtio's. Written from the specifications of virtio (split virtqueues, block device) and of vhost-user.
 *
 * usage: vhost_frontend SOCKET PATTERN BYTES DEPTH SECONDS DISK_BYTES BACKEND_PID
 */
#include <poll.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include "workload.h"

#define QUEUE 128u
#define SEGMENTS_MAX 64u

/* vhost-user messages. */
enum {
    GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, SET_MEM_TABLE = 5, SET_VRING_NUM = 8, SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10, SET_VRING_KICK = 12, SET_VRING_CALL = 13, GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16, SET_VRING_ENABLE = 18,
};
#define MESSAGE_VERSION 1u
#define MESSAGE_NEEDS_REPLY 8u

/* A guest that knows no flush has each write durable when it is answered. */
#define FEATURE_FLUSH (1ull << 9)
#define FEATURE_INDIRECT (1ull << 28)
#define FEATURE_EVENT_INDEX (1ull << 29)
#define FEATURE_PROTOCOL (1ull << 30)
#define FEATURE_VERSION_1 (1ull << 32)
#define PROTOCOL_REPLY_ACK (1ull << 3)
/* QEMU's backend insists on it. */
#define PROTOCOL_CONFIG (1ull << 9)

struct message {
    uint32_t request, flags, size;
    union {
        uint64_t number;
        struct {
            uint32_t index, value;
        } state;
        struct {
            uint32_t index, flags;
            uint64_t descriptors, used, available, log;
        } address;
        struct {
            uint32_t count, padding;
            uint64_t guest_address, size, our_address, offset;
        } region;
    } body;
} __attribute__((packed));

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};
#define MORE 1u
#define WRITTEN_BY_DEVICE 2u
#define INDIRECT 4u

/* One request and its pages; all of it is in the shared memory. */
struct transfer {
    struct descriptor table[SEGMENTS_MAX + 2];
    struct {
        uint32_t type, priority;
        uint64_t sector;
    } header;
    uint64_t block;
    uint8_t status;
};

struct shared {
    struct descriptor descriptors[QUEUE];
    struct {
        uint16_t flags;
        _Atomic uint16_t index;
        uint16_t ring[QUEUE];
        _Atomic uint16_t used_event;
    } available;
    struct {
        _Alignas(4) uint16_t flags;
        _Atomic uint16_t index;
        struct {
            uint32_t id, length;
        } ring[QUEUE];
        _Atomic uint16_t available_event;
    } used;
    struct transfer transfers[QUEUE];
};

static struct workload work;
static uint8_t *memory;
static struct shared *shared;
static int backend, kick, call;
static uint16_t produced, consumed;

static void send_message(uint32_t request, const struct message *body, uint32_t size, const int *fd)
{
    struct message message = *body;
    union {
        struct cmsghdr header;
        uint8_t bytes[CMSG_SPACE(sizeof(int))];
    } control;
    bool asks = request == GET_FEATURES || request == GET_PROTOCOL_FEATURES;

    message.request = request;
    message.flags = MESSAGE_VERSION | (request > SET_OWNER && !asks && request != SET_PROTOCOL_FEATURES ? MESSAGE_NEEDS_REPLY : 0);
    message.size = size;
    struct iovec vector = {&message, 12 + size};
    struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1};
    if (fd != NULL) {
        header.msg_control = &control;
        header.msg_controllen = sizeof control;
        control.header = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof *fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.header), fd, sizeof *fd);
    }
    REQUIRE(sendmsg(backend, &header, 0) == (ssize_t)vector.iov_len);
}

static uint64_t receive_number(uint32_t request)
{
    struct message message;

    REQUIRE(recv(backend, &message, 20, MSG_WAITALL) == 20 && message.request == request && message.size == 8);
    return message.body.number;
}

static uint64_t ask(uint32_t request)
{
    struct message none = {.request = request};

    send_message(request, &none, 0, NULL);
    return receive_number(request);
}

static void tell(uint32_t request, struct message message, uint32_t size, const int *fd)
{
    send_message(request, &message, size, fd);
    if (request > SET_OWNER && request != SET_PROTOCOL_FEATURES) {
        REQUIRE(receive_number(request) == 0);
    }
}

/* Addresses that the ring names are offsets in the memory. */
static uint64_t guest(const volatile void *place)
{
    return (uint64_t)((const volatile uint8_t *)place - memory);
}

static uint8_t *page_of(uint32_t number, uint32_t block)
{
    /* After the ring, never two neighbours together. */
    uint32_t pages = work.depth * work.request_blocks;
    uint32_t step = pages % 37 != 0 ? 37 : 41;
    uint32_t first = (uint32_t)(sizeof *shared / BLOCK + 1);

    return memory + (size_t)(first + (number * work.request_blocks + block) * step % pages) * BLOCK;
}

static void connect_backend(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t pages = sizeof *shared / BLOCK + 1 + (size_t)work.depth * work.request_blocks;
    uint64_t wanted =
        FEATURE_FLUSH | FEATURE_INDIRECT | FEATURE_EVENT_INDEX | FEATURE_PROTOCOL | FEATURE_VERSION_1;
    int fd = memfd_create("guest", MFD_CLOEXEC);

    REQUIRE(fd >= 0 && ftruncate(fd, (off_t)(pages * BLOCK)) == 0);
    memory = mmap(NULL, pages * BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    REQUIRE(memory != MAP_FAILED);
    shared = (struct shared *)memory;
    backend = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    REQUIRE(connect(backend, (struct sockaddr *)&address, sizeof address) == 0);
    REQUIRE((ask(GET_FEATURES) & wanted) == wanted);
    uint64_t protocol = ask(GET_PROTOCOL_FEATURES) & (PROTOCOL_REPLY_ACK | PROTOCOL_CONFIG);
    REQUIRE((protocol & PROTOCOL_REPLY_ACK) != 0);
    tell(SET_PROTOCOL_FEATURES, (struct message){.body.number = protocol}, 8, NULL);
    tell(SET_OWNER, (struct message){.size = 0}, 0, NULL);
    tell(SET_FEATURES, (struct message){.body.number = wanted}, 8, NULL);
    struct message region = {.body.region = {.count = 1, .size = pages * BLOCK, .our_address = (uintptr_t)memory}};
    tell(SET_MEM_TABLE, region, sizeof region.body.region, &fd);
    tell(SET_VRING_NUM, (struct message){.body.state = {0, QUEUE}}, 8, NULL);
    tell(SET_VRING_BASE, (struct message){.body.state = {0, 0}}, 8, NULL);
    struct message ring = {.body.address = {
        .descriptors = (uintptr_t)shared->descriptors,
        .used = (uintptr_t)&shared->used,
        .available = (uintptr_t)&shared->available,
    }};
    tell(SET_VRING_ADDR, ring, sizeof ring.body.address, NULL);
    kick = eventfd(0, EFD_CLOEXEC);
    call = eventfd(0, EFD_CLOEXEC);
    tell(SET_VRING_CALL, (struct message){.body.number = 0}, 8, &call);
    tell(SET_VRING_KICK, (struct message){.body.number = 0}, 8, &kick);
    tell(SET_VRING_ENABLE, (struct message){.body.state = {0, 1}}, 8, NULL);
}

/* What of a request is always the same. */
static void prepare(uint32_t number)
{
    struct transfer *transfer = &shared->transfers[number];
    uint32_t blocks = work.request_blocks;

    transfer->header.type = work.writing ? 1 : 0;
    transfer->table[0] = (struct descriptor){guest(&transfer->header), sizeof transfer->header, MORE, 1};
    for (uint32_t block = 0; block < blocks; block++) {
        uint16_t flags = work.writing ? MORE : MORE | WRITTEN_BY_DEVICE;
        transfer->table[1 + block] = (struct descriptor){guest(page_of(number, block)), BLOCK, flags, (uint16_t)(2 + block)};
    }
    transfer->table[1 + blocks] = (struct descriptor){guest(&transfer->status), 1, WRITTEN_BY_DEVICE, 0};
    uint32_t length = (blocks + 2) * (uint32_t)sizeof transfer->table[0];
    shared->descriptors[number] = (struct descriptor){guest(transfer->table), length, INDIRECT, 0};
}

static void begin(uint32_t number)
{
    struct transfer *transfer = &shared->transfers[number];

    transfer->block = workload_next(&work);
    transfer->header.sector = transfer->block * (BLOCK / 512);
    transfer->status = 0xff;
    for (uint32_t block = 0; work.writing && block < work.request_blocks; block++) {
        stamp(page_of(number, block), transfer->block + block);
    }
    shared->available.ring[produced++ % QUEUE] = (uint16_t)number;
}

static void push(void)
{
    uint16_t before = atomic_load_explicit(&shared->available.index, memory_order_relaxed);
    uint64_t one = 1;

    if (before == produced) {
        return;
    }
    atomic_store_explicit(&shared->available.index, produced, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    uint16_t event = atomic_load_explicit(&shared->used.available_event, memory_order_relaxed);
    if ((uint16_t)(produced - event - 1) < (uint16_t)(produced - before)) {
        REQUIRE(write(kick, &one, sizeof one) == sizeof one);
    }
}

static uint32_t take_responses(bool again)
{
    uint16_t used = atomic_load_explicit(&shared->used.index, memory_order_acquire);
    uint32_t ended = 0;

    for (; consumed != used; consumed++, ended++) {
        uint32_t number = shared->used.ring[consumed % QUEUE].id;
        REQUIRE(number < work.depth && shared->transfers[number].status == 0);
        for (uint32_t block = 0; !work.writing && block < work.request_blocks; block++) {
            check_stamp(page_of(number, block), shared->transfers[number].block + block);
        }
        if (again) {
            begin(number);
        }
    }
    return ended;
}

static void await_responses(void)
{
    uint64_t taken;

    atomic_store_explicit(&shared->available.used_event, consumed, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&shared->used.index, memory_order_relaxed) == consumed) {
        struct pollfd ready = {.fd = call, .events = POLLIN};
        REQUIRE(poll(&ready, 1, 60000) == 1);
        REQUIRE(read(call, &taken, sizeof taken) == sizeof taken);
    }
}

int main(int count, char **arguments)
{
    REQUIRE(count == 8);
    workload_read(&work, arguments + 2);
    REQUIRE(work.depth <= QUEUE && work.request_blocks <= SEGMENTS_MAX);
    connect_backend(arguments[1]);
    for (uint32_t i = 0; i < work.depth; i++) {
        prepare(i);
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
