/*
 * A false /dev/xen/gntdev and /dev/xen/evtchn for xen/gntdev.c, which is linked with --wrap of the calls here. Every
 * argument is checked as the kernel checks it. The frontend is domain 7 with PAGES pages.
 *
 * The event channel is as the kernel's: what the frontend sends makes it pending. A port that is pending and not masked is
 * reported once, to whoever reads, and is masked then, until its number is written back.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

typedef uint32_t grant_ref_t;
typedef uint16_t domid_t;
#include <xen/evtchn.h>
#include <xen/gntdev.h>

#define FRONTEND 7u
#define PAGES 64u
#define PAGE 4096u
#define REMOTE_PORT 5u
#define LOCAL_PORT 77u

#define REQUIRE(condition) ((condition) ? (void)0 : die(#condition, __LINE__))

struct map {
    uint64_t index;
    uint32_t count, references[512];
    void *memory; /* while mapped */
};

/* For the test: the page of each reference, +1, or a negative status of a copy; what is read-only. */
int32_t fake_grants[PAGES];
bool fake_readonly[PAGES];
int fake_copy_calls;
_Atomic int fake_notifications;
/* How often the port was unmasked. */
_Atomic int fake_written;
/* Called for each notification of the frontend. */
void (*fake_on_notify)(void);
/* The next ioctl fails so. */
int fake_errno;

static int memory_fd = -1, gntdev_fd = -1, evtchn_fd = -1, evtchn_peer = -1;
static uint8_t *memory;
static struct map maps[16];
static uint64_t next_index = 4 * PAGE;
static bool bound;
static pthread_mutex_t port_lock = PTHREAD_MUTEX_INITIALIZER;
static bool masked, pending; /* under the lock */

static void die(const char *what, int line)
{
    fprintf(stderr, "fake kernel, line %d: %s (errno %d)\n", line, what, errno);
    abort();
}

int __real_open(const char *path, int flags, ...);
int __real_ioctl(int fd, unsigned long request, ...);
void *__real_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset);
int __real_munmap(void *address, size_t length);
int __real_close(int fd);
ssize_t __real_write(int fd, const void *data, size_t length);

uint8_t *fake_memory(void)
{
    if (memory == NULL) {
        memory_fd = memfd_create("frontend", MFD_CLOEXEC);
        REQUIRE(memory_fd >= 0 && ftruncate(memory_fd, PAGES * PAGE) == 0);
        memory = __real_mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
        REQUIRE(memory != MAP_FAILED);
    }
    return memory;
}

/* Grants that the kernel still keeps for us. */
int fake_kept(void)
{
    int kept = 0;
    for (size_t i = 0; i < sizeof maps / sizeof maps[0]; i++) {
        kept += maps[i].index != 0;
    }
    return kept;
}

int fake_bound(void)
{
    return bound;
}

static void deliver(void)
{
    uint32_t port = LOCAL_PORT;
    REQUIRE(__real_write(evtchn_peer, &port, sizeof port) == (ssize_t)sizeof port);
    masked = true;
    pending = false;
}

/* The frontend notifies. */
void fake_event(void)
{
    pthread_mutex_lock(&port_lock);
    pending = true;
    if (!masked) {
        deliver();
    }
    pthread_mutex_unlock(&port_lock);
}

static void unmask(const void *data, ssize_t length)
{
    REQUIRE(length == sizeof(uint32_t) && *(const uint32_t *)data == LOCAL_PORT);
    pthread_mutex_lock(&port_lock);
    bool was_masked = masked;
    masked = false;
    if (was_masked && pending) {
        deliver();
    }
    pthread_mutex_unlock(&port_lock);
}

static int failure(int error)
{
    errno = error;
    return -1;
}

int __wrap_open(const char *path, int flags, ...)
{
    if (strncmp(path, "/dev/xen/", 9) != 0) {
        va_list arguments;
        va_start(arguments, flags);
        int mode = va_arg(arguments, int);
        va_end(arguments);
        return __real_open(path, flags, mode);
    }
    REQUIRE((flags & O_CLOEXEC) != 0 && (flags & O_ACCMODE) == O_RDWR);
    if (fake_errno != 0) {
        errno = fake_errno;
        return -1;
    }
    if (strcmp(path, "/dev/xen/gntdev") == 0) {
        fake_memory();
        gntdev_fd = __real_open("/dev/null", O_RDWR | O_CLOEXEC);
        return gntdev_fd;
    }
    if (strcmp(path, "/dev/xen/evtchn") == 0) {
        int ends[2];
        REQUIRE((flags & O_NONBLOCK) != 0);
        REQUIRE(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0);
        evtchn_fd = ends[0];
        evtchn_peer = ends[1];
        masked = pending = false;
        return evtchn_fd;
    }
    return failure(ENOENT);
}

int __wrap_close(int fd)
{
    if (fd == gntdev_fd) {
        REQUIRE(fake_kept() == 0);
        gntdev_fd = -1;
    } else if (fd == evtchn_fd) {
        REQUIRE(!bound);
        __real_close(evtchn_peer);
        evtchn_fd = evtchn_peer = -1;
    }
    return __real_close(fd);
}

static struct map *find(uint64_t index)
{
    for (size_t i = 0; i < sizeof maps / sizeof maps[0]; i++) {
        if (maps[i].index == index) {
            return &maps[i];
        }
    }
    return NULL;
}

static int map_references(struct ioctl_gntdev_map_grant_ref *call)
{
    struct map *map = find(0);
    const uint8_t *references = (const uint8_t *)call + 16;

    REQUIRE(map != NULL);
    if (call->count == 0 || call->count > 512) {
        return failure(EINVAL);
    }
    *map = (struct map){.index = next_index, .count = call->count};
    for (uint32_t i = 0; i < call->count; i++) {
        struct ioctl_gntdev_grant_ref reference;
        memcpy(&reference, references + i * sizeof reference, sizeof reference);
        REQUIRE(reference.domid == FRONTEND);
        map->references[i] = reference.ref;
    }
    call->index = next_index;
    next_index += (uint64_t)call->count * PAGE;
    return 0;
}

static int unmap_references(const struct ioctl_gntdev_unmap_grant_ref *call)
{
    struct map *map = find(call->index);

    if (call->index == 0 || map == NULL || map->count != call->count) {
        return failure(ENOENT);
    }
    REQUIRE(map->memory == NULL);
    map->index = 0;
    return 0;
}

static int copy_segment(struct gntdev_grant_copy_segment *segment)
{
    bool from = segment->flags == 1;
    REQUIRE(segment->flags == 1 || segment->flags == 2);
    uint32_t reference = from ? segment->source.foreign.ref : segment->dest.foreign.ref;
    uint32_t offset = from ? segment->source.foreign.offset : segment->dest.foreign.offset;
    REQUIRE((from ? segment->source.foreign.domid : segment->dest.foreign.domid) == FRONTEND);
    if (offset + segment->len > PAGE) {
        return failure(EINVAL);
    }
    if (reference >= PAGES || fake_grants[reference] <= 0) {
        segment->status = reference >= PAGES || fake_grants[reference] == 0 ? -3 : (int16_t)fake_grants[reference];
        return 0;
    }
    if (!from && fake_readonly[reference]) {
        segment->status = -8;
        return 0;
    }
    uint8_t *theirs = memory + ((uint32_t)fake_grants[reference] - 1) * PAGE + offset;
    memcpy(from ? segment->dest.virt : theirs, from ? theirs : segment->source.virt, segment->len);
    segment->status = 0;
    return 0;
}

static int copy_segments(const struct ioctl_gntdev_grant_copy *call)
{
    fake_copy_calls++;
    for (uint32_t i = 0; i < call->count; i++) {
        if (copy_segment(&call->segments[i]) < 0) {
            return -1;
        }
    }
    return 0;
}

int __wrap_ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;

    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (fake_errno != 0) {
        return failure(fake_errno);
    }
    if (fd == gntdev_fd) {
        switch (request) {
        case 0x184700: /* what the compiler makes of the kernel's macros must be what the kernel was built with */
            return map_references(argument);
        case 0x104701:
            return unmap_references(argument);
        case 0x104708:
            return copy_segments(argument);
        default:
            return failure(ENOTTY);
        }
    }
    REQUIRE(fd == evtchn_fd);
    if (request == 0x084501) {
        const struct ioctl_evtchn_bind_interdomain *bind = argument;
        if (bind->remote_domain != FRONTEND || bind->remote_port != REMOTE_PORT) {
            return failure(EINVAL);
        }
        bound = true;
        return (int)LOCAL_PORT;
    }
    REQUIRE(bound && *(const uint32_t *)argument == LOCAL_PORT);
    if (request == 0x044503) {
        bound = false;
    } else if (request == 0x044504) {
        atomic_fetch_add(&fake_notifications, 1);
        if (fake_on_notify != NULL) {
            fake_on_notify();
        }
    } else {
        return failure(ENOTTY);
    }
    return 0;
}

void *__wrap_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    if (fd < 0 || fd != gntdev_fd) {
        return __real_mmap(address, length, protection, flags, fd, offset);
    }
    struct map *map = find((uint64_t)offset);
    REQUIRE(offset != 0 && map != NULL && map->memory == NULL && map->count * PAGE == length && flags == MAP_SHARED);
    for (uint32_t i = 0; i < map->count; i++) {
        uint32_t reference = map->references[i];
        if (reference >= PAGES || fake_grants[reference] <= 0 || ((protection & PROT_WRITE) != 0 && fake_readonly[reference])) {
            errno = EINVAL;
            return MAP_FAILED;
        }
    }
    map->memory = __real_mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(map->memory != MAP_FAILED);
    for (uint32_t i = 0; i < map->count; i++) {
        off_t page = (fake_grants[map->references[i]] - 1) * (off_t)PAGE;
        void *place = (uint8_t *)map->memory + (size_t)i * PAGE;
        REQUIRE(__real_mmap(place, PAGE, protection, MAP_SHARED | MAP_FIXED, memory_fd, page) == place);
    }
    return map->memory;
}

int __wrap_munmap(void *address, size_t length)
{
    for (size_t i = 0; i < sizeof maps / sizeof maps[0]; i++) {
        if (maps[i].index != 0 && maps[i].memory == address) {
            REQUIRE(length == maps[i].count * PAGE);
            maps[i].memory = NULL;
        }
    }
    return __real_munmap(address, length);
}

ssize_t __wrap_write(int fd, const void *data, size_t length)
{
    if (fd < 0 || fd != evtchn_fd) {
        return __real_write(fd, data, length);
    }
    atomic_fetch_add(&fake_written, 1);
    unmask(data, (ssize_t)length);
    return (ssize_t)length;
}
