//! The Python face of the Rust core: conversion, GIL release, error mapping. No logic.
