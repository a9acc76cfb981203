"""What a program needs of its machine: process, devices, arithmetic, files, errors."""
