"""ONNX: conversion, the check of what was written, sessions of ONNX Runtime."""
