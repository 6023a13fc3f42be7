/*
 * The static probes (USDT) of the engine, for bpftrace, perf and SystemTap; docs/monitoring.md has their arguments. A
 * probe that nobody watches is one no-op. Without the header of the package systemtap-sdt-dev the
 * engine has none.
 */
#ifndef TAPFS_PROBES_H
#define TAPFS_PROBES_H

#if defined(__has_include)
#if __has_include(<sys/sdt.h>)
#include <sys/sdt.h>
#define TAPFS_HAS_PROBES 1
#endif
#endif

#ifdef TAPFS_HAS_PROBES
#define TAPFS_PROBE2(name, one, two) DTRACE_PROBE2(tapfs, name, one, two)
#define TAPFS_PROBE3(name, one, two, three) DTRACE_PROBE3(tapfs, name, one, two, three)
#define TAPFS_PROBE4(name, one, two, three, four) DTRACE_PROBE4(tapfs, name, one, two, three, four)
#else
#define TAPFS_PROBE2(name, one, two) ((void)(one), (void)(two))
#define TAPFS_PROBE3(name, one, two, three) ((void)(one), (void)(two), (void)(three))
#define TAPFS_PROBE4(name, one, two, three, four) ((void)(one), (void)(two), (void)(three), (void)(four))
#endif

#endif
