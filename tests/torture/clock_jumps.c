/*
 * A clock that is set again and again, as by NTP, an administrator or a resumed machine: loaded before the C library, it
 * moves the time of day of a program by up to ten years, forward and back, at every eighth look. The time since the
 * start stands as it was.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/time.h>
#include <time.h>

#define DAY 86400

static atomic_uint looks;

static time_t jump(void)
{
    static const time_t jumps[] = {0, 3600, -3600, 400 * DAY, -400 * DAY, 1, -1, 3650 * DAY, -3650 * DAY, 30};
    return jumps[atomic_fetch_add(&looks, 1) / 8 % (sizeof jumps / sizeof jumps[0])];
}

int clock_gettime(clockid_t clock, struct timespec *time)
{
    static int (*real)(clockid_t, struct timespec *);
    if (real == NULL) {
        *(void **)&real = dlsym(RTLD_NEXT, "clock_gettime");
    }
    int result = real(clock, time);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        time->tv_sec += jump();
    }
    return result;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone)
{
    struct timespec now;
    (void)zone;
    int result = clock_gettime(CLOCK_REALTIME, &now);
    time->tv_sec = now.tv_sec;
    time->tv_usec = now.tv_nsec / 1000;
    return result;
}

time_t time(time_t *where)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where != NULL) {
        *where = now.tv_sec;
    }
    return now.tv_sec;
}
