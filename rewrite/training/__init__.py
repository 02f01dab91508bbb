"""What a step of training keeps and costs: gradients in few bits, packing, what autograd saves."""
