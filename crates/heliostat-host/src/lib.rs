//! What touches the host: system calls, io_uring, aligned memory, the real clock.
