"""What computes: attention, the loss, dropout, fp32 sums; their precision and compilation."""
