/*
 * A simulated machine in a directory: a domain's pages and its grant table are files that both sides map, an event
 * channel is a pair of FIFOs. tests/xen/machine.py has the guest's side and says what the files are called.
 *
 * The frontend writes the grant table as it likes, so an entry is read once and then judged. The size of a file is
 * that of the moment it was opened; the machine never changes one.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "xen/transport_operations.h"

/* An entry of the grant table: the page's number above these. */
#define GRANT_VALID 1u
#define GRANT_READONLY 2u
#define GRANT_PAGE_SHIFT 2
/* The headers of Linux before 5.14 lack it. */
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

struct memory_transport {
    struct xen_transport transport;
    int fd;          /* the pages */
    uint8_t *memory; /* all of them, for copies; NULL: there are none */
    uint64_t pages;
    const _Atomic uint32_t *grants; /* NULL: there are none */
    uint64_t references;
    char directory[];
};

struct memory_channel {
    struct xen_channel channel; /* its fd: "to-backend" */
    int to_frontend;
};

static int open_file(const struct memory_transport *machine, const char *suffix, int flags, mode_t kind, struct stat *status)
{
    char path[4096];
    int length = snprintf(path, sizeof path, "%s/domain-%u.%s", machine->directory, machine->transport.domain, suffix);

    if (length < 0 || (size_t)length >= sizeof path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    int fd = open(path, O_RDWR | O_CLOEXEC | flags);
    if (fd < 0) {
        return -1;
    }
    if (fstat(fd, status) == 0 && (status->st_mode & S_IFMT) == kind) {
        return fd;
    }
    close(fd);
    errno = EINVAL;
    return -1;
}

/* Map what of a file is whole units; NULL with errno 0 if that is nothing. */
static void *map_whole(int fd, int protection, uint64_t unit, const struct stat *status, uint64_t *units)
{
    *units = (uint64_t)status->st_size / unit;
    if (*units == 0) {
        errno = 0;
        return NULL;
    }
    void *memory = mmap(NULL, *units * unit, protection, MAP_SHARED, fd, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static struct memory_transport *of(struct xen_transport *transport)
{
    return (struct memory_transport *)transport;
}

static void memory_close(struct xen_transport *transport)
{
    struct memory_transport *machine = of(transport);

    if (machine->memory != NULL) {
        munmap(machine->memory, machine->pages * XEN_PAGE);
    }
    if (machine->grants != NULL) {
        munmap((void *)(uintptr_t)machine->grants, machine->references * sizeof *machine->grants);
    }
    if (machine->fd >= 0) {
        close(machine->fd);
    }
    free(machine);
}

/* The page that a reference grants. 0 or an errno. */
static int granted(const struct memory_transport *machine, uint32_t reference, bool writable, uint64_t *page)
{
    if (reference >= machine->references) {
        return EINVAL;
    }
    uint32_t entry = atomic_load_explicit(&machine->grants[reference], memory_order_acquire);
    if ((entry & GRANT_VALID) == 0) {
        return EINVAL;
    }
    if (writable && (entry & GRANT_READONLY) != 0) {
        return EACCES;
    }
    *page = entry >> GRANT_PAGE_SHIFT;
    return *page < machine->pages ? 0 : EFAULT;
}

static int map_pages(const struct memory_transport *machine, const uint32_t *references, uint32_t count, bool writable,
                     uint8_t *memory)
{
    int protection = PROT_READ | (writable ? PROT_WRITE : 0);

    for (uint32_t i = 0; i < count; i++) {
        uint64_t page = 0;
        int error = granted(machine, references[i], writable, &page);
        if (error != 0) {
            return error;
        }
        uint8_t *place = memory + (size_t)i * XEN_PAGE;
        off_t offset = (off_t)(page * XEN_PAGE);
        if (mmap(place, XEN_PAGE, protection, MAP_SHARED | MAP_FIXED, machine->fd, offset) == MAP_FAILED) {
            return errno;
        }
    }
    return 0;
}

static int memory_map(struct xen_transport *transport, const uint32_t *references, uint32_t count, bool writable,
                      struct xen_mapping *mapping)
{
    size_t length = (size_t)count * XEN_PAGE;
    /* Keeps the addresses together until each has its page. */
    uint8_t *memory = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (memory == MAP_FAILED) {
        return errno;
    }
    int error = map_pages(of(transport), references, count, writable, memory);
    if (error != 0) {
        munmap(memory, length);
        return error;
    }
    *mapping = (struct xen_mapping){.memory = memory, .pages = count};
    return 0;
}

static void memory_unmap(struct xen_transport *transport, const struct xen_mapping *mapping)
{
    (void)transport;
    munmap(mapping->memory, (size_t)mapping->pages * XEN_PAGE);
}

/* Whether memory that may vanish is there now, from the page of its first byte on. A kernel before 5.14 cannot say. */
static bool is_there(const uint8_t *memory, size_t length)
{
    uintptr_t start = (uintptr_t)memory / XEN_PAGE * XEN_PAGE;
    return madvise((void *)start, (uintptr_t)memory + length - start, MADV_POPULATE_READ) == 0;
}

/* As the kernel's device does it: memory that is gone fails the whole call. Here it must not go between the look and the
 * copy, which would be a signal. */
static int look_for_vanished(const struct xen_copy *pieces, size_t count)
{
    for (size_t i = 0, next; i < count; i = next) {
        size_t length = pieces[i].length;
        next = i + 1;
        if (!pieces[i].may_vanish) {
            continue;
        }
        for (; next < count && pieces[next].may_vanish && pieces[next].local == pieces[i].local + length; next++) {
            length += pieces[next].length;
        }
        if (!is_there(pieces[i].local, length)) {
            return EFAULT;
        }
    }
    return 0;
}

static void memory_copy(struct xen_transport *transport, struct xen_copy *pieces, size_t count, bool to_frontend)
{
    const struct memory_transport *machine = of(transport);
    int vanished = look_for_vanished(pieces, count);

    for (size_t i = 0; i < count; i++) {
        struct xen_copy *piece = &pieces[i];
        uint64_t page = 0;
        if (piece->error == 0) {
            piece->error = vanished != 0 ? vanished : granted(machine, piece->reference, to_frontend, &page);
        }
        if (piece->error != 0) {
            continue;
        }
        uint8_t *theirs = machine->memory + page * XEN_PAGE + piece->offset;
        memcpy(to_frontend ? theirs : piece->local, to_frontend ? piece->local : theirs, piece->length);
    }
}

static struct xen_channel *memory_bind(struct xen_transport *transport, uint32_t port)
{
    struct memory_channel *channel = malloc(sizeof *channel);
    struct stat status;
    char suffix[64];

    if (channel == NULL) {
        return NULL;
    }
    /* For reading and writing, so that neither end ever looks closed. */
    snprintf(suffix, sizeof suffix, "port-%u.to-backend", port);
    channel->channel.operations = transport->operations;
    channel->channel.fd = open_file(of(transport), suffix, O_NONBLOCK, S_IFIFO, &status);
    if (channel->channel.fd < 0) {
        free(channel);
        return NULL;
    }
    snprintf(suffix, sizeof suffix, "port-%u.to-frontend", port);
    channel->to_frontend = open_file(of(transport), suffix, O_NONBLOCK, S_IFIFO, &status);
    /* Xen binds a port once, until whoever did it lets go of it or ends. */
    if (channel->to_frontend >= 0 && flock(channel->channel.fd, LOCK_EX | LOCK_NB) != 0) {
        close(channel->to_frontend);
        channel->to_frontend = -1;
        errno = EINVAL;
    }
    if (channel->to_frontend < 0) {
        int error = errno;
        close(channel->channel.fd);
        free(channel);
        errno = error;
        return NULL;
    }
    return &channel->channel;
}

static void memory_unbind(struct xen_channel *channel)
{
    struct memory_channel *pair = (struct memory_channel *)channel;

    close(pair->channel.fd);
    close(pair->to_frontend);
    free(pair);
}

static void memory_clear(struct xen_channel *channel)
{
    uint8_t taken[4096];

    /* A frontend that notifies without end must not keep us here: what is left wakes us once more. */
    while (read(channel->fd, taken, sizeof taken) < 0 && errno == EINTR) {
    }
}

static void memory_notify(struct xen_channel *channel)
{
    /* Full: the frontend has notifications that it did not take, one more says nothing new. */
    while (write(((struct memory_channel *)channel)->to_frontend, "", 1) < 0 && errno == EINTR) {
    }
}

static const struct xen_operations memory_operations = {
    .close = memory_close,
    .map = memory_map,
    .unmap = memory_unmap,
    .copy = memory_copy,
    .bind = memory_bind,
    .unbind = memory_unbind,
    .clear = memory_clear,
    .notify = memory_notify,
};

/* Open and map the files of the domain. 0 or an errno. */
static int open_domain(struct memory_transport *machine)
{
    struct stat status;

    machine->fd = open_file(machine, "memory", 0, S_IFREG, &status);
    if (machine->fd < 0) {
        return errno;
    }
    machine->memory = map_whole(machine->fd, PROT_READ | PROT_WRITE, XEN_PAGE, &status, &machine->pages);
    if (machine->memory == NULL && machine->pages != 0) {
        return errno;
    }
    int fd = open_file(machine, "grants", 0, S_IFREG, &status);
    if (fd < 0) {
        return errno;
    }
    machine->grants = map_whole(fd, PROT_READ, sizeof *machine->grants, &status, &machine->references);
    int error = machine->grants == NULL && machine->references != 0 ? errno : 0;
    close(fd);
    return error;
}

struct xen_transport *xen_memory_open(const char *directory, uint32_t domain)
{
    size_t length = strlen(directory) + 1;
    struct memory_transport *machine = calloc(1, sizeof *machine + length);

    if (machine == NULL) {
        return NULL;
    }
    memcpy(machine->directory, directory, length);
    machine->transport = (struct xen_transport){.operations = &memory_operations, .domain = domain};
    machine->fd = -1;
    int error = open_domain(machine);
    if (error != 0) {
        memory_close(&machine->transport);
        errno = error;
        return NULL;
    }
    return &machine->transport;
}
