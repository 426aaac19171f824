// Runs operators of a library for a program on another processor: reads calls from standard input, writes what the
// tensors hold afterwards to standard output. tests/ops/conftest.py is the other side.
//
//     driver LIBRARY
//
// A call: the operator's name, the number of tensors, then of each its type's name, its sizes and its bytes. A text is
// its length and its bytes; lengths and numbers are int64.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <string>
#include <vector>

typedef int (*Operator)(int, void **, int *, int64_t **, const char **, void *, void *);

static bool read_all(void *to, size_t count) { return count == 0 || fread(to, 1, count, stdin) == count; }

static int64_t number() {
    int64_t n = 0;
    if (!read_all(&n, sizeof n)) exit(0);  // no further call
    return n;
}

static std::string text() {
    std::string s(number(), 0);
    if (!read_all(&s[0], s.size())) exit(1);
    return s;
}

int main(int, char **arguments) {
    void *library = dlopen(arguments[1], RTLD_NOW);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
    reinterpret_cast<void (*)(int)>(dlsym(library, "set_threads"))(3);
    for (;;) {
        const std::string name = text();
        const int count = static_cast<int>(number());
        std::vector<std::string> types(count), bytes(count);
        std::vector<std::vector<int64_t>> shapes(count);
        std::vector<void *> data(count);
        std::vector<int> ndims(count);
        std::vector<int64_t *> sizes(count);
        std::vector<const char *> kinds(count);
        for (int i = 0; i < count; i++) {
            types[i] = text();
            shapes[i].resize(number());
            for (int64_t &size : shapes[i]) size = number();
            bytes[i] = text();
            data[i] = &bytes[i][0], ndims[i] = static_cast<int>(shapes[i].size());
            sizes[i] = shapes[i].data(), kinds[i] = types[i].c_str();
        }
        const Operator run = reinterpret_cast<Operator>(dlsym(library, name.c_str()));
        const int64_t status = run ? run(count, data.data(), ndims.data(), sizes.data(), kinds.data(), 0, 0) : -1;
        fwrite(&status, sizeof status, 1, stdout);
        for (const std::string &b : bytes) fwrite(b.data(), 1, b.size(), stdout);
        fflush(stdout);
    }
}
