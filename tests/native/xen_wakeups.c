/*
 * A ring whose event channel is as the kernel's: masked from each report until its number is written back (xen_fake_kernel.c).
 * A frontend puts requests in at any moment and notifies where the ring says so, somebody pauses and wakes the thread. A
 * notification that the thread misses is a frontend that waits for ever.
 * usage: xen_wakeups FILE ROUNDS; 0 and how often the port was unmasked, or a message and 1.
 */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "owned_disk.h"
#include "xen/xen.h"

#define ENTRIES 32u
#define ENTRY_BYTES 112u
#define PORT 5u
#define UNKNOWN 99u
#define FLUSH 3u
#define PATIENCE_SECONDS 60

struct indices {
    _Atomic uint32_t req_prod, req_event, rsp_prod, rsp_event;
};

extern int32_t fake_grants[];
extern _Atomic int fake_written;
extern void (*fake_on_notify)(void);
uint8_t *fake_memory(void);
void fake_event(void);
int fake_bound(void);

static tapfs_xen *device;
static struct indices *ring;
static uint32_t produced, consumed;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t notified = PTHREAD_COND_INITIALIZER;
static bool notification;
static atomic_bool over;

static void on_notify(void)
{
    pthread_mutex_lock(&lock);
    notification = true;
    pthread_cond_signal(&notified);
    pthread_mutex_unlock(&lock);
}

static void put(unsigned *seed)
{
    uint8_t *slot = (uint8_t *)ring + 64 + produced % ENTRIES * ENTRY_BYTES;
    memset(slot, 0, ENTRY_BYTES);
    slot[0] = rand_r(seed) % 8 == 0 ? FLUSH : UNKNOWN;
    produced++;
    atomic_store(&ring->req_prod, produced);
    if (produced - atomic_load(&ring->req_event) < 1) {
        fake_event();
    }
}

static void await_responses(void)
{
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += PATIENCE_SECONDS;
    atomic_store(&ring->rsp_event, consumed + 1);
    if (atomic_load(&ring->rsp_prod) != consumed) {
        return;
    }
    pthread_mutex_lock(&lock);
    while (!notification) {
        REQUIRE(pthread_cond_timedwait(&notified, &lock, &end) == 0); /* else a notification was lost */
    }
    notification = false;
    pthread_mutex_unlock(&lock);
}

static void linger(unsigned *seed)
{
    for (int spins = rand_r(seed) % 3 == 0 ? 0 : rand_r(seed) % 4000; spins > 0; spins--) {
        __asm__ volatile("");
    }
}

static void be_guest(int rounds, unsigned seed)
{
    for (int round = 0; round < rounds; round++) {
        for (uint32_t burst = 1 + (uint32_t)rand_r(&seed) % 6; burst > 0 && produced - consumed < ENTRIES; burst--) {
            put(&seed);
            linger(&seed);
        }
        while (consumed != produced) {
            consumed = atomic_load(&ring->rsp_prod);
            if (consumed != produced && rand_r(&seed) % 2 == 0) {
                break;
            }
            if (consumed != produced) {
                await_responses();
            }
        }
    }
    while ((consumed = atomic_load(&ring->rsp_prod)) != produced) {
        await_responses();
    }
}

static void *disturb(void *argument)
{
    unsigned seed = 7;
    (void)argument;
    while (!atomic_load(&over)) {
        tapfs_xen_limit(device, 0, rand_r(&seed) % 3 == 0 ? 40000 : 0);
        tapfs_xen_pause(device);
        tapfs_xen_unpause(device);
        usleep(200);
    }
    tapfs_xen_limit(device, 0, 0);
    return NULL;
}

static void *own_syncs(void *argument)
{
    tapfs_parked parked;
    (void)argument;
    while (tapfs_xen_next_parked(device, TAPFS_SYNCS, &parked, 1)) {
        tapfs_xen_complete(device, parked.ticket, 0);
    }
    return NULL;
}

int main(int count, char **words)
{
    pthread_t owner, disturber;

    REQUIRE(count == 3);
    int rounds = atoi(words[2]), journal = memfd_create("journal", MFD_CLOEXEC);
    owned_disk_open(words[1]);
    ring = (struct indices *)(void *)fake_memory();
    fake_grants[0] = 1;
    fake_on_notify = on_notify;
    atomic_store(&ring->req_event, 1);
    atomic_store(&ring->rsp_event, 1);
    tapfs_xen_options options = {
        .domain = 7,
        .protocol = TAPFS_XEN_X86_64,
        .workers = 1,
        .journal = journal,
        .writable = 1,
        .io_uring = 1,
    };
    device = tapfs_xen_new(disk, &options);
    REQUIRE(device != NULL && tapfs_xen_add_ring(device, &(uint32_t){0}, 1, PORT) == 0);
    REQUIRE(tapfs_xen_start(device) == 0);
    pthread_create(&owner, NULL, own_syncs, NULL);
    pthread_create(&disturber, NULL, disturb, NULL);
    be_guest(rounds / 4, 1);
    atomic_store(&over, true);
    pthread_join(disturber, NULL);
    /* And again with nobody who would wake a thread that has missed a notification. */
    be_guest(rounds, 2);
    tapfs_xen_stop(device);
    pthread_join(owner, NULL);
    tapfs_xen_free(device);
    REQUIRE(!fake_bound());
    owned_disk_close();
    close(journal);
    printf("%d\n", fake_written);
    return 0;
}
