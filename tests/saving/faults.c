/* Preloaded into a process, fails one call that changes files below a folder: see fault_injection.py.
 *
 * arm(root, k, mode) counts such calls from 1 on. At the k-th:
 *   mode 1 ends the process (half of what a write was given is written),
 *   mode 2 fails with ENOSPC, mode 3 with EIO (half of a write is written, too),
 *   mode 4 fails with ENOSPC, and so does every later call that takes room.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static long at, count, mode;

void arm(const char *folder, long k, long how) {
    snprintf(root, sizeof root, "%s", folder);
    at = k;
    count = 0;
    mode = how;
}

long counted(void) { return count; }

static int below(const char *path) { return !strncmp(path, root, strlen(root)); }

static int concerns_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

static int concerns(int dir, const char *path) {
    if (path[0] == '/') return below(path);
    char here[PATH_MAX];
    return dir == AT_FDCWD ? getcwd(here, sizeof here) && below(here) : concerns_fd(dir);
}

/* Whether this call is to fail; errno is set then. room: it takes room on the disk. */
static int fails(int room) {
    count++;
    if (mode == 4 ? count < at || !room : count != at) return 0;
    if (mode == 1) _exit(137);
    errno = mode == 3 ? EIO : ENOSPC;
    return 1;
}

#define REAL(result, name, ...)                                                  \
    static result (*real)(__VA_ARGS__);                                          \
    if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define OPEN(name)                                                               \
    int name(const char *path, int flags, ...) {                                 \
        va_list rest;                                                            \
        va_start(rest, flags);                                                   \
        int bits = va_arg(rest, int);                                            \
        va_end(rest);                                                            \
        REAL(int, name, const char *, int, ...);                                 \
        if (mode && (flags & (O_WRONLY | O_RDWR | O_CREAT)) && concerns(AT_FDCWD, path) && fails(flags & O_CREAT)) return -1; \
        return real(path, flags, bits);                                          \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                             \
    int name(int dir, const char *path, int flags, ...) {                        \
        va_list rest;                                                            \
        va_start(rest, flags);                                                   \
        int bits = va_arg(rest, int);                                            \
        va_end(rest);                                                            \
        REAL(int, name, int, const char *, int, ...);                            \
        if (mode && (flags & (O_WRONLY | O_RDWR | O_CREAT)) && concerns(dir, path) && fails(flags & O_CREAT)) return -1; \
        return real(dir, path, flags, bits);                                     \
    }
OPENAT(openat)
OPENAT(openat64)

FILE *fopen(const char *path, const char *how) {
    REAL(FILE *, fopen, const char *, const char *);
    if (mode && strpbrk(how, "wa+") && concerns(AT_FDCWD, path) && fails(1)) return NULL;
    return real(path, how);
}

FILE *fopen64(const char *path, const char *how) {
    REAL(FILE *, fopen64, const char *, const char *);
    if (mode && strpbrk(how, "wa+") && concerns(AT_FDCWD, path) && fails(1)) return NULL;
    return real(path, how);
}

/* Half of it is written where this is the call that fails: what a power cut or a full disk leaves. */
ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t);
    if (mode && concerns_fd(fd)) {
        if (count + 1 == at && size > 1) real(fd, data, size / 2);
        if (fails(1)) return -1;
    }
    return real(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    if (mode && concerns_fd(fd) && fails(1)) return -1;
    return real(fd, parts, n);
}

#define PWRITE(name, offset_t)                                                   \
    ssize_t name(int fd, const void *data, size_t size, offset_t offset) {       \
        REAL(ssize_t, name, int, const void *, size_t, offset_t);                \
        if (mode && concerns_fd(fd) && fails(1)) return -1;                      \
        return real(fd, data, size, offset);                                     \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define ON_FD(name, room)                                                        \
    int name(int fd) {                                                           \
        REAL(int, name, int);                                                    \
        if (mode && concerns_fd(fd) && fails(room)) return -1;                   \
        return real(fd);                                                         \
    }
ON_FD(fsync, 0)
ON_FD(fdatasync, 0)

int ftruncate64(int fd, off64_t size) {
    REAL(int, ftruncate64, int, off64_t);
    if (mode && concerns_fd(fd) && fails(0)) return -1;
    return real(fd, size);
}

int ftruncate(int fd, off_t size) {
    REAL(int, ftruncate, int, off_t);
    if (mode && concerns_fd(fd) && fails(0)) return -1;
    return real(fd, size);
}

int fchmod(int fd, mode_t bits) {
    REAL(int, fchmod, int, mode_t);
    if (mode && concerns_fd(fd) && fails(0)) return -1;
    return real(fd, bits);
}

#define ON_PATH(name)                                                            \
    int name(const char *path) {                                                 \
        REAL(int, name, const char *);                                           \
        if (mode && concerns(AT_FDCWD, path) && fails(0)) return -1;             \
        return real(path);                                                       \
    }
ON_PATH(unlink)
ON_PATH(rmdir)
ON_PATH(remove)

int chmod(const char *path, mode_t bits) {
    REAL(int, chmod, const char *, mode_t);
    if (mode && concerns(AT_FDCWD, path) && fails(0)) return -1;
    return real(path, bits);
}

int mkdir(const char *path, mode_t bits) {
    REAL(int, mkdir, const char *, mode_t);
    if (mode && concerns(AT_FDCWD, path) && fails(1)) return -1;
    return real(path, bits);
}

int mkdirat(int dir, const char *path, mode_t bits) {
    REAL(int, mkdirat, int, const char *, mode_t);
    if (mode && concerns(dir, path) && fails(1)) return -1;
    return real(dir, path, bits);
}

int unlinkat(int dir, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    if (mode && concerns(dir, path) && fails(0)) return -1;
    return real(dir, path, flags);
}

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    if (mode && concerns(AT_FDCWD, to) && fails(0)) return -1;
    return real(from, to);
}

int renameat(int dir, const char *from, int other, const char *to) {
    REAL(int, renameat, int, const char *, int, const char *);
    if (mode && concerns(other, to) && fails(0)) return -1;
    return real(dir, from, other, to);
}

int link(const char *from, const char *to) {
    REAL(int, link, const char *, const char *);
    if (mode && concerns(AT_FDCWD, to) && fails(1)) return -1;
    return real(from, to);
}

int linkat(int dir, const char *from, int other, const char *to, int flags) {
    REAL(int, linkat, int, const char *, int, const char *, int);
    if (mode && concerns(other, to) && fails(1)) return -1;
    return real(dir, from, other, to, flags);
}
